"""Start a leg's process, and turn whatever becomes of it into a row of the leaderboard.

A leg that fails must not fail its step: a comparison goes on without it, and KFP's collecting task
runs only when every leg's task has succeeded. A pod that is killed as a whole can't report that,
though. So each attempt is counted in a file beside the checkpoints, and the last of KFP's retries
reports what became of the ones before instead of trying once more. Where checkpoints go to an
object store, the count is an object there: a pod's own disk is lost with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tuneline.artifacts import digest_of
from tuneline.checkpoints_root import local_root, remote_root
from tuneline.compare.leg import FAILED, Job, heading, write_job
from tuneline.compare.legs import leg_of
from tuneline.errors import EXIT_TERMINATED, StorageError, Terminated
from tuneline.object_store import Folder
from tuneline.progress import report

LOST_ATTEMPTS: Final = 3
"""So many pods may vanish without a word; the next one says so. Not more than KFP's retries."""
_LAST_LINES: Final = 3
_LESS_MEMORY: Final = "lower training.batch_tokens, or set training.gradient_checkpointing: true"


def run_watched(job: Job, environment: dict[str, str]) -> dict[str, Any]:
    """Run the leg's process to its end; returns its row, of a failed one with the reason.

    Args:
        job: what to do; its `result` is set here.
        environment: added to this process's own.

    Raises:
        Terminated: SIGTERM arrived; the leg's process has ended.
    """
    row = heading(leg_of(job.leg))
    with _attempt(job) as lost:
        if lost >= LOST_ATTEMPTS:
            reason = (
                f"its pod was lost {lost} times without a word, most likely killed for lack of "
                f"memory: {_LESS_MEMORY}"
            )
            return {**row, "status": FAILED, "reason": reason}
        with tempfile.TemporaryDirectory(prefix="tuneline-leg-") as folder:
            outcome = _run(job, Path(folder), environment)
    if "reason" in outcome:
        reason = outcome["reason"].removeprefix(f"{row['method']}: ")  # the row has that name
        return {**row, "status": FAILED, "reason": reason}
    return outcome


def _run(job: Job, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    result, errors = folder / "result.json", folder / "stderr"
    write_job(Job(**{**vars(job), "result": str(result)}), folder / "job.json")
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneline.compare.leg", str(folder / "job.json")],
            stderr=stderr,
            env={**os.environ, **environment},
        )
        try:
            code = process.wait()
        except BaseException:  # SIGTERM or Ctrl-C: the leg writes its checkpoint first
            process.terminate()
            process.wait()
            raise
    text = errors.read_text(encoding="utf-8", errors="replace")
    sys.stderr.write(text)
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    if code == EXIT_TERMINATED:
        raise Terminated("what is trained is in a checkpoint: run it again to go on")
    return {"reason": _why(code, text)}


def _why(code: int, text: str) -> str:
    if code == -signal.SIGKILL:
        return f"killed, most likely by the system for lack of memory: {_LESS_MEMORY}"
    lines = [line.strip() for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{how} and no result: {' / '.join(lines) or 'it printed no error'}"


@contextmanager
def _attempt(job: Job) -> Iterator[int]:
    """Count this attempt; gives how many before it ended without a word."""
    root = local_root()
    if root is None or not job.run_id:
        yield 0
        return
    name = digest_of([job.run_id, job.leg]).removeprefix("sha256:")[:32]
    remote = remote_root()
    count = _Stored(f"{remote}/legs", name) if remote else _OnDisk(root / "legs" / name)
    lost = count.read()
    count.write(lost + 1)
    try:
        yield lost
    except Terminated:
        count.write(lost)  # a reclaimed node is no word of this leg's
        raise
    count.remove()


class _OnDisk:
    """A count as a file with so many bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        return self._path.stat().st_size if self._path.is_file() else 0

    def write(self, number: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.truncate(number)
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Stored:
    """The same as an object."""

    def __init__(self, url: str, name: str) -> None:
        self._folder = Folder(url, hurried=True)
        self._name = name

    def read(self) -> int:
        return len(self._folder.read(self._name) or b"")

    def write(self, number: int) -> None:
        self._folder.write(self._name, b"." * number)

    def remove(self) -> None:
        try:
            self._folder.remove([self._name])
        except StorageError as error:  # the leg has its row
            report(f"warning: the count of its attempts is left there: {error}")
