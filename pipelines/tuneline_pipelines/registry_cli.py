"""The commands around registered models: promote, approve, rollback, history, models."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tuneline.errors import UsageError

_SHORTEST_SECRET: Final = 16


def add_commands(commands: Any) -> None:
    """Add all of them to the parser of `tuneline`."""
    _add_register(commands)
    _add_promote(commands)
    _add_approve(commands)
    _add_approval_webhook(commands)
    _add_rollback(commands)
    _add_history(commands)
    _add_models(commands)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow server (default: MLFLOW_TRACKING_URI)"
    )


def _use_tracking_uri(options: argparse.Namespace) -> None:
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri


def _add_register(commands: Any) -> None:
    register = commands.add_parser("register", help="MergedModel + EvalReport -> version in MLflow")
    register.add_argument("--model", required=True, metavar="DIR", help="a MergedModel")
    register.add_argument("--report", required=True, metavar="DIR", help="its EvalReport")
    register.add_argument("--name", required=True, help="of the registered model")
    register.add_argument(
        "--require-approval", action="store_true", help="promotion waits for `tuneline approve`"
    )
    _add_common(register)
    register.set_defaults(command=_register)


def _register(options: argparse.Namespace) -> int:
    from tuneline import steps

    _use_tracking_uri(options)
    registry = {"model_name": options.name, "require_approval": options.require_approval}
    print(steps.register(options.model, options.report, registry))
    return 0


def _add_promote(commands: Any) -> None:
    promote = commands.add_parser("promote", help="registered version -> champion")
    promote.add_argument("name", metavar="NAME", help="of the registered model")
    promote.add_argument("--version", required=True, type=int, metavar="N")
    promote.add_argument(
        "--expect-champion",
        type=int,
        metavar="M",
        help="fail unless version M is champion now; 0: unless there is none",
    )
    promote.add_argument(
        "--to-model", metavar="NAME", help="then copy it to this model, and promote the copy there"
    )
    promote.add_argument("--by", metavar="WHO", help="kept in the history (default: your login)")
    _add_common(promote)
    promote.set_defaults(command=_promote)


def _promote(options: argparse.Namespace) -> int:
    from tuneline import steps

    _use_tracking_uri(options)
    registry = {"model_name": options.name, "to_model": options.to_model}
    steps.promote(
        registry,
        options.version,
        expect_champion=options.expect_champion,
        by=options.by or _login(),
    )
    return 0


def _login() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"user {os.getuid()}"


def _add_approve(commands: Any) -> None:
    approve = commands.add_parser("approve", help="let a version that waits be promoted")
    approve.add_argument("name", metavar="NAME", help="of the registered model")
    approve.add_argument("--version", required=True, type=int, metavar="N")
    approve.add_argument("--by", required=True, metavar="WHO", help="kept in the history")
    approve.add_argument("--reason", required=True, help="kept in the history")
    _add_common(approve)
    approve.set_defaults(command=_approve)


def _approve(options: argparse.Namespace) -> int:
    from tuneline.register.approve import approve

    _use_tracking_uri(options)
    approve(options.name, options.version, by=options.by, reason=options.reason)
    return 0


def _add_approval_webhook(commands: Any) -> None:
    webhook = commands.add_parser(
        "approval-webhook", help="take approvals from MLflow's webhooks, until it is stopped"
    )
    webhook.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    webhook.add_argument("--port", type=int, default=8080, help="(default: %(default)s)")
    _add_common(webhook)
    webhook.set_defaults(command=_approval_webhook)


def _approval_webhook(options: argparse.Namespace) -> int:
    from tuneline.register.webhook import SECRET_VARIABLE, serve

    _use_tracking_uri(options)
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < _SHORTEST_SECRET:
        raise UsageError(
            f"{SECRET_VARIABLE} must hold the secret that the webhook was made with, at least "
            f"{_SHORTEST_SECRET} characters: anyone who knows it can approve"
        )
    serve(options.host, options.port, secret)
    return 0


def _add_rollback(commands: Any) -> None:
    rollback = commands.add_parser("rollback", help="back to the champion before")
    rollback.add_argument("name", metavar="NAME", help="of the registered model")
    rollback.add_argument("--to", type=int, metavar="N", help="an earlier champion")
    rollback.add_argument("--by", metavar="WHO", help="kept in the history (default: your login)")
    rollback.add_argument("--reason", default="", help="kept in the history")
    _add_common(rollback)
    rollback.set_defaults(command=_rollback)


def _rollback(options: argparse.Namespace) -> int:
    from tuneline.register.rollback import rollback

    _use_tracking_uri(options)
    rollback(options.name, by=options.by or _login(), to=options.to, reason=options.reason)
    return 0


def _add_history(commands: Any) -> None:
    history = commands.add_parser("history", help="what was done to a model, in order")
    history.add_argument("name", metavar="NAME", help="of the registered model")
    history.add_argument("--json", action="store_true", help="for programs")
    _add_common(history)
    history.set_defaults(command=_history)


def _history(options: argparse.Namespace) -> int:
    from tuneline.register.overview import as_json, events

    _use_tracking_uri(options)
    found = events(options.name)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
        return 0
    print(
        table(
            ("entry", "when (UTC)", "action", "version", "by", "outcome"),
            ((e.number, e.at[:19], e.action, e.version, e.by, e.outcome) for e in found),
        )
    )
    return 0


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="what is registered, aliases, scores")
    models.add_argument("name", nargs="?", metavar="NAME", help="one registered model only")
    models.add_argument("--json", action="store_true", help="for programs")
    _add_common(models)
    models.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> int:
    from tuneline.register.overview import as_json, models

    _use_tracking_uri(options)
    found = models(options.name)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
        return 0
    print(
        table(
            ("model", "version", "aliases", "method", "metric", "base", "tuned", "gate", "when"),
            (
                (
                    m.model_name, m.version, ", ".join(m.aliases), m.method, m.metric,
                    m.base_score, m.tuned_score, m.gate, m.registered_at[:19],
                )
                for m in found
            ),
        )
    )  # fmt: skip
    return 0


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [list(head), *([" ".join(str(cell).split()) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
