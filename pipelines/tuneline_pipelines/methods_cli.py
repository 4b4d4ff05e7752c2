"""The commands around fine-tuning methods: methods, chat, compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_commands(commands: Any) -> None:
    """Add all of them to the parser of `tuneline`."""
    _add_methods(commands)


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


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text, the first row being the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))
