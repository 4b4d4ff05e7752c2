"""Trains on request in forked children, so that a test pays for the imports once.

Reads one JSON object a line, `{"log": FILE, "file_size_limit": BYTES or absent, "environment":
VARIABLES or absent, ...arguments of finetune}`, and answers with the pid of the child, then with
its exit status (negative: the signal) when it has ended.
"""

import json
import os
import resource
import sys
import traceback
from pathlib import Path

from tuneline import recipe
from tuneline.finetune import train, trainer  # noqa: F401  the imports are the point
from tuneline.progress import ranks
from tuneline.steps import guard
from tuneline.tracking import Untracked


def finetune(base_model: str, dataset: str, method: dict, training: dict, output: str) -> None:
    settings = recipe.method_settings(method)
    section = recipe.check(recipe.TrainingSection, training, source="training")
    if ranks()[0] > 0:
        train.accompany(base_model, Path(dataset), settings, section)
    else:
        train.finetune(base_model, Path(dataset), settings, section, Path(output), Untracked())


def child(request: dict) -> None:
    log = os.open(request.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if limit := request.pop("file_size_limit", None):  # as a full disk: writing fails half-way
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ.update(request.pop("environment", {}))
    code = 70
    try:
        guard(finetune, **request)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001  a forked child must never return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
