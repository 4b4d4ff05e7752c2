"""Promotes versions of one model, each in a process of its own, all at the same moment.

A script that imports everything once, and reads races from stdin, a JSON object a line: `model`,
`lease_seconds`, `folder` for logs, and `racers`, a list of `version`, `expect_champion` (or null),
and what happens to it: `die_at` (number of the request to MLflow's API before which it is killed,
artifacts not counted; 0: never) or `stop_at_alias` (it stops itself before it sets the alias
`champion`, until somebody continues it). Prints JSON lines: the processes' ids, how each ended
with its sentence, and an empty object at the end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ENDS = {10: "champion", 11: "refused", 12: "conflict", 13: "error"}


def run(options: dict[str, Any], racer: dict[str, Any], sentence: Path) -> int:
    """Promote one version; returns the process's exit code."""
    from tuneline.errors import ConflictError, RegistryError
    from tuneline.register.promote import Request, promote

    interrupt(racer)
    request = Request(
        racer["version"],
        by=f"racer {racer['version']}",
        expect_champion=racer["expect_champion"],
        lease_seconds=options["lease_seconds"],
    )
    try:
        promotion = promote(options["model"], request)
    except ConflictError as error:
        sentence.write_text(str(error))
        return 12
    except RegistryError as error:
        sentence.write_text(str(error))
        return 13
    sentence.write_text(promotion.reason)
    return 10 if promotion.alias else 11


def interrupt(racer: dict[str, Any]) -> None:
    """Kill or stop this process before a certain request leaves it."""
    import requests

    send = requests.Session.send
    sent = 0

    def watched(session: Any, request: Any, **options: Any) -> Any:
        nonlocal sent
        if "mlflow-artifacts" not in request.url:
            sent += 1
            if sent == racer.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            is_alias = "alias" in request.url and b'"champion"' in (request.body or b"")
            if is_alias and racer.pop("stop_at_alias", False):
                os.kill(os.getpid(), signal.SIGSTOP)
        return send(session, request, **options)

    requests.Session.send = watched


def race(options: dict[str, Any]) -> None:
    """Fork the racers, let them go at once, and tell how each ended."""
    folder = Path(options["folder"])
    gate_reader, gate_writer = os.pipe()
    children: dict[int, tuple[int, dict[str, Any]]] = {}
    for number, racer in enumerate(options["racers"]):
        pid = os.fork()
        if pid == 0:
            os.close(gate_writer)
            log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.read(gate_reader, 1)  # ends when the parent closes its side
            code = 1
            try:
                code = run(options, racer, folder / f"{number}.txt")
            finally:
                sys.stdout.flush()
                os._exit(code)
        children[pid] = (number, racer)
    os.close(gate_reader)
    time.sleep(0.2)
    os.close(gate_writer)
    tell({"pids": list(children)})
    while children:
        pid, status = os.wait()
        number, racer = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        sentence = folder / f"{number}.txt"
        tell(
            {
                "version": racer["version"],
                "end": "killed" if code == -signal.SIGKILL else ENDS.get(code, f"exit {code}"),
                "sentence": sentence.read_text() if sentence.exists() else "",
                "log": (folder / f"{number}.log").read_text(),
            }
        )
    tell({})


def tell(values: dict[str, Any]) -> None:
    """One line to who asked."""
    print(json.dumps(values), flush=True)


def main() -> None:
    """Import what the racers need, and run every race that is asked for."""
    import mlflow  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from tuneline.register import promote  # noqa: F401

    for line in sys.stdin:
        race(json.loads(line))


if __name__ == "__main__":
    main()
