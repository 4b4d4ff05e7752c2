"""One process for each accelerator of a pod: torchrun around the training step.

The step's own process starts torchrun and waits. What its first process reports goes through; what
it fails with becomes this process's own error, since torchrun's table of exit codes tells a person
nothing. SIGTERM is handed on, so that the processes write their checkpoint together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tuneline.errors import Terminated, TrainingError, UsageError

VARIABLE: Final = "TUNELINE_PROCESSES"
"""How many processes train; unset: one for each accelerator."""
_DEVICES: Final = ("/dev/nvidiactl", "/dev/kfd")
"""One of them is there where CUDA or ROCm has an accelerator, whichever of the node's it is."""
_ERROR: Final = "error: "
_KILLED: Final = "exitcode  : -9"
_STOPPED: Final = "finetune was stopped by SIGTERM; "
"""What `steps.guard` puts in front of a process's own words."""


def processes() -> int:
    """How many processes this step has to start; 1 where torchrun has started this one.

    Raises:
        UsageError: TUNELINE_PROCESSES is no number.
    """
    if "LOCAL_RANK" in os.environ:
        return 1
    if chosen := os.environ.get(VARIABLE):
        if not chosen.isdecimal() or int(chosen) < 1:
            raise UsageError(f"{VARIABLE} must be a number from 1 on, not '{chosen}'")
        return int(chosen)
    if not any(Path(device).exists() for device in _DEVICES):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def train_together(arguments: Mapping[str, Any], count: int) -> None:
    """Run `steps.finetune` with these arguments in `count` processes.

    Raises:
        TrainingError: one of them failed, also where SIGTERM had arrived; with its own sentence.
        Terminated: SIGTERM arrived; the processes have ended, with their own words.
    """
    with tempfile.TemporaryDirectory(prefix="tuneline-ranks-") as folder:
        job, errors = Path(folder) / "job.json", Path(folder) / "stderr"
        job.write_text(json.dumps(dict(arguments)), encoding="utf-8")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc-per-node={count}", "-m", "tuneline.finetune.launch", str(job)],
                stderr=stderr,
            )  # fmt: skip
            stopped: BaseException | None = None
            try:
                code = process.wait()
            except (Terminated, KeyboardInterrupt) as signal:  # they write their checkpoint first
                process.terminate()
                code = process.wait()
                stopped = signal
        text = errors.read_text(encoding="utf-8", errors="replace")
    sys.stderr.write(text)
    if isinstance(stopped, Terminated):
        raise _as_stopped(text, count, code) from stopped
    if stopped is not None:
        raise stopped
    if code:
        sentences = _sentences(text)
        raise TrainingError(sentences[0] if sentences else _without_a_word(text, count))


def _as_stopped(text: str, count: int, code: int) -> BaseException:
    """What a stopped run ends with: of a checkpoint only its writers know."""
    sentences = _sentences(text)
    failures = [sentence for sentence in sentences if not sentence.startswith(_STOPPED)]
    if failures or _KILLED in text:
        return TrainingError(failures[0] if failures else _without_a_word(text, count))
    if sentences:
        return Terminated(sentences[0].removeprefix(_STOPPED))
    if code == 0:
        return Terminated("training had ended, and its result is written")
    return Terminated(
        "no process said that it wrote a checkpoint: run it again to go on from the last one"
    )


def _sentences(text: str) -> list[str]:
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        if line.startswith(_ERROR):
            rest = lines[number + 1 :]
            more = next((n for n, other in enumerate(rest) if not other.startswith("  - ")), 0)
            found.append("\n".join([line.removeprefix(_ERROR), *rest[:more]]))
    return found


def _without_a_word(text: str, count: int) -> str:
    if _KILLED in text:
        return (
            f"one of {count} training processes was killed, most likely by the system for lack of "
            "memory: lower training.batch_tokens, or set training.gradient_checkpointing: true"
        )
    return f"one of {count} training processes failed; the reason is above"


def main() -> None:
    """What each process does."""
    from tuneline import steps

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    steps.guard(steps.finetune, **job)


if __name__ == "__main__":
    main()
