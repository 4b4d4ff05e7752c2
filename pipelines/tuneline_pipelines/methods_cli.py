"""The commands around fine-tuning methods: methods, chat, compare."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline.errors import DataError, UsageError
from tuneline.progress import aligned, complain

if TYPE_CHECKING:
    from tuneline.chat import Chat

_COLUMN: Final = 30
"""Narrower columns are no help to read."""


def add_commands(commands: Any) -> None:
    """Add all of them to the parser of `tuneline`."""
    _add_methods(commands)
    _add_chat(commands)
    _add_compare(commands)


def _add_methods(commands: Any) -> None:
    methods = commands.add_parser("methods", help="list the fine-tuning methods")
    methods.add_argument(
        "--json", action="store_true", help="with every hyperparameter, its default and meaning"
    )
    methods.set_defaults(command=_methods)


def _methods(options: argparse.Namespace) -> int:
    from tuneline.finetune.methods.overview import overview, table

    if options.json:
        print(json.dumps(overview(), indent=2, ensure_ascii=False))
        return 0
    print(aligned(table()))
    print("\nHyperparameters: tuneline methods --json. Which one to take: docs/methods.md.")
    return 0


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a base, to adapters on it and to registered models, side by side",
        epilog="In the conversation: /use NAME ... (who answers), /all, /reset, /quit.",
    )
    chat.add_argument(
        "--base-model", metavar="M", help="`demo`, a local model folder, or hf://org/name@commit"
    )
    chat.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an Adapter on the base; may be given several times",
    )
    chat.add_argument(
        "--model",
        metavar="DIR|models:/NAME@ALIAS",
        help="a MergedModel or PackagedModel, or a registered version (models:/NAME/N)",
    )
    chat.add_argument("--prompt", metavar="TEXT", help="ask this once and end")
    chat.add_argument("--system", default="", metavar="TEXT", help="the system message")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(256)")
    chat.add_argument("--json", action="store_true", help="with --prompt: answers as JSON")
    chat.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow server (default: MLFLOW_TRACKING_URI)"
    )
    chat.set_defaults(command=_chat)


def _chat(options: argparse.Namespace) -> int:
    adapters = [_named_adapter(given) for given in options.adapter]
    if adapters and not options.base_model:
        raise UsageError("--adapter needs --base-model, the base that it was trained on")
    if not options.base_model and not options.model:
        raise UsageError("nobody to talk to: give --base-model, --model, or both")
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if options.json and not options.prompt:
        raise UsageError("--json needs --prompt")
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri
    from tuneline import chat, steps

    steps.quiet_libraries()
    with chat.Chat(system=options.system, max_new_tokens=options.max_new_tokens) as talk:
        if options.base_model:
            talk.add_base(options.base_model)
        for name, folder in adapters:
            talk.add_adapter(name, folder)
        if options.model:
            talk.add_model(options.model)
        talk.load()
        if options.prompt is None:
            _converse(talk)
        else:
            answers = list(talk.ask(options.prompt))
            print(chat.as_json(answers) if options.json else side_by_side(answers))
    return 0


def _named_adapter(given: str) -> tuple[str, Path]:
    name, _, folder = given.partition("=")
    if not folder or name.split() != [name] or "/" in name:
        raise UsageError(
            f"--adapter '{given}' is not of the form NAME=DIR, for example law=runs/law/adapter; "
            "a name has no '/' and no white space"
        )
    return name, Path(folder)


def _converse(talk: Chat) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing
    print(f"Talking to {', '.join(talk.names)}. /use NAME ..., /all, /reset, /quit")
    chosen: list[str] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        command, *names = text.split() or [""]
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                talk.reset()
            elif command == "/all":
                chosen = []
            elif command == "/use" and names:
                talk.check(names)
                chosen = names
            elif command.startswith("/"):
                raise UsageError("commands are /use NAME ..., /all, /reset, /quit")
            elif text:
                print(side_by_side(list(talk.ask(text, chosen))))
        except (UsageError, DataError) as error:  # the conversation goes on
            complain(str(error))


def side_by_side(answers: Sequence[tuple[str, str]]) -> str:
    """Answers in columns where the terminal is wide enough for them, else one below the other."""
    gap = " | "
    width = (shutil.get_terminal_size().columns - len(gap) * (len(answers) - 1)) // len(answers)
    if len(answers) == 1 or width < _COLUMN:
        return "\n\n".join(f"{name}:\n{text}" for name, text in answers)
    columns = [[name, "-" * len(name), *_wrapped(text, width)] for name, text in answers]
    height = max(len(column) for column in columns)
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(gap.join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="train a recipe with several methods, to a leaderboard"
    )
    compare.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    compare.add_argument(
        "--methods",
        default="all",
        metavar="NAME,...",
        help="methods, and legs of the recipe's compare section (default: all)",
    )
    compare.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be given several times",
    )
    compare.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="work folder (default: tuneline-runs/NAME-compare)",
    )
    compare.add_argument("--quiet", action="store_true", help="print the leaderboard only")
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from tuneline import recipe
    from tuneline.compare.leaderboard import HTML, table
    from tuneline.compare.legs import legs_of

    resolved = recipe.read(options.recipe, options.overrides, exports=False)
    methods = [name.strip() for name in options.methods.split(",") if name.strip()]
    legs_of(resolved, methods, source=str(options.recipe))  # before anything runs
    from tuneline_pipelines.local import run_compare

    workdir = options.workdir or Path("tuneline-runs") / f"{options.recipe.stem}-compare"
    board = run_compare(resolved, methods, workdir, quiet=options.quiet)
    print(f"\n{table(board)}\n\nreport: {workdir.absolute() / HTML}")
    return 0
