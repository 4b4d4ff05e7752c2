"""Figures on their way to a server that may be away: a file that a thread sends from.

Each entry is appended as one line of JSON, with the time at which it was measured; a thread sends
what is there in batches and notes how far it came. A server that does not answer delays nothing
but the sending. What is not sent when the process ends, however it ends, is in the file for the
next one that opens it.

Nothing is sent twice. An attempt whose answer was lost is repeated with the same times, which a
server that keys its points by name, step, time and value takes as the same; and a resumed run,
which computes some steps again, adds nothing for steps that are in the file already.

A file holds up nothing: a line that a power cut has damaged is left out, and a file that the server
refuses for good is set aside, each with a warning that names it.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from tuneline.errors import RegistryError
from tuneline.progress import report

_LINGER_SECONDS: Final = 1.0
"""What is put within this time goes out together."""
_LONGEST_PAUSE_SECONDS: Final = 30.0
_BATCH_FIGURES: Final = 1000
"""MLflow takes no more in a request."""


class Refused(RegistryError):
    """The server will never take what it was sent."""


@dataclass(frozen=True)
class Entry:
    """Figures measured together."""

    metrics: dict[str, float]
    step: int
    time_ms: int
    """Of the measurement, milliseconds since 1970."""
    status: str = ""
    """How the run ended, in its last entry."""
    params: dict[str, str] = field(default_factory=dict)
    """Settings of the run."""
    about: dict[str, str] = field(default_factory=dict)
    """Whose figures follow, in the first entry."""


class Spool:
    """A file of entries and the thread that sends them.

    Args:
        path: of the file; made with its folder, or gone on from.
        send: delivers entries, or raises RegistryError, after which it is called again with them,
            or Refused, after which it is not.
        about: whose figures they are, for a process that finds the file.

    Attributes:
        finished: the file says how the run ended.
        refused: the server has refused the file for good; closing sets it aside.

    Raises:
        BlockingIOError: another process has it open.
    """

    def __init__(
        self,
        path: Path,
        send: Callable[[Sequence[Entry]], None],
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._sent_path = path.with_suffix(".sent")
        self._send = send
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        """Patience is over: from now on the files are another spool's."""
        self._complained = False
        self.refused = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._latest: dict[str, int] = {}
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        except OSError:  # a file system without locks
            pass
        entries, end, damaged = _read(path, 0)
        if damaged:
            report(f"warning: {path}: damaged lines are left out: {damaged}")
        for entry, _ in entries:
            self._remember(entry)
        self._file.truncate(end)  # half a line that a kill left
        self._sent = self._read_sent(end)
        self.finished = bool(entries) and entries[-1][0].status != ""
        if not entries and about:
            self._append(Entry({}, 0, int(time.time() * 1000), about=dict(about)))
        self._thread = threading.Thread(target=self._run, name="tuneline-spool", daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Add figures of a step; those that the file has for this step or a later one are not."""
        fresh = {k: float(v) for k, v in metrics.items() if step > self._latest.get(k, -1)}
        if not fresh:
            return
        self._append(Entry(fresh, step, int(time.time() * 1000)))

    def put_params(self, params: Mapping[str, str]) -> None:
        """Add settings of the run."""
        self._append(Entry({}, 0, int(time.time() * 1000), params=dict(params)))

    def put_status(self, status: str) -> None:
        """Add how the run ended."""
        self._append(Entry({}, 0, int(time.time() * 1000), status))
        self.finished = True

    def _append(self, entry: Entry) -> None:
        self._file.write(json.dumps(asdict(entry)).encode() + b"\n")
        self._file.flush()
        self._remember(entry)
        self._wake.set()

    def _remember(self, entry: Entry) -> None:
        for key in entry.metrics:
            self._latest[key] = max(entry.step, self._latest.get(key, -1))

    def close(self, patience_seconds: float) -> bool:
        """Wait until all is sent, at most so long; returns whether it is."""
        self._closing.set()
        self._wake.set()
        self._thread.join(patience_seconds)
        self._abandoned.set()
        self._file.close()  # and gives up the lock
        if self.refused:
            self._path.replace(self._refused_path)
            self._sent_path.unlink(missing_ok=True)
            return False
        return self._sent == self._path.stat().st_size

    def remove(self) -> None:
        """Remove the files of a closed spool that has done its work."""
        self._path.unlink(missing_ok=True)
        self._sent_path.unlink(missing_ok=True)

    @property
    def _refused_path(self) -> Path:
        return self._path.with_name(self._path.name + ".refused")

    def _read_sent(self, size: int) -> int:
        try:
            sent = int(self._sent_path.read_text())
        except (FileNotFoundError, ValueError):  # a power cut leaves an empty one
            return 0
        return sent if 0 <= sent <= size else 0

    def _run(self) -> None:
        pause = _LINGER_SECONDS
        while not self._abandoned.is_set():
            try:
                waiting, whole, _ = _read(self._path, self._sent)
                if waiting:
                    # first on this disk: what was sent must not be computed and sent again
                    with self._path.open("rb") as file:
                        os.fsync(file.fileno())
            except FileNotFoundError:
                if self._abandoned.is_set():  # the next one has sent them, and removed the file
                    return
                raise
            except OSError as error:  # of a shared volume, for a moment
                self._complain(error)
                self._closing.wait(_LINGER_SECONDS)
                if self._closing.is_set():
                    self._abandoned.wait(_LINGER_SECONDS)
                continue
            batch: list[Entry] = []
            end = self._sent
            for entry, position in waiting:
                if sum(len(e.metrics) for e in (*batch, entry)) > _BATCH_FIGURES:
                    break
                batch.append(entry)
                end = position
            if len(batch) == len(waiting):
                end = whole  # with what is damaged behind it
            if not batch:
                self._sent = end
                if self._closing.is_set():
                    return
                self._wake.wait()
                self._wake.clear()
                self._closing.wait(_LINGER_SECONDS)
                continue
            try:
                self._send(batch)
            except Refused as error:
                report(
                    f"warning: MLflow refuses the metrics in {self._path} for good, they are kept "
                    f"in {self._refused_path}: {error}"
                )
                self.refused = True
                return
            except RegistryError as error:
                self._complain(error)
                if self._closing.is_set():  # whoever closes decides how long
                    self._abandoned.wait(_LINGER_SECONDS)
                elif not self._closing.wait(pause):
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if self._abandoned.is_set():
                return
            self._note_sent(end)
            if self._complained:
                report("MLflow is back: the metrics that waited are sent")
            self._complained, pause = False, _LINGER_SECONDS
            if len(batch) == len(waiting):
                self._closing.wait(_LINGER_SECONDS)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            report(f"warning: metrics wait in {self._path} until MLflow is back: {error}")
            self._complained = True

    def _note_sent(self, end: int) -> None:
        aside = self._sent_path.with_suffix(".partial")
        try:
            with aside.open("w") as file:
                file.write(str(end))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._sent_path)
        except OSError as error:  # a later one says it; a process that starts anew asks MLflow
            report(f"warning: {self._sent_path} can't be written: {error}")
        self._sent = end


def about(path: Path) -> dict[str, str]:
    """Whose figures a file holds, empty if it does not say."""
    entries, _, _ = _read(path, 0)
    return entries[0][0].about if entries else {}


def _read(path: Path, start: int) -> tuple[list[tuple[Entry, int]], int, list[int]]:
    """Entries with the positions of their ends, that of the last whole line, and the numbers of the
    lines that are none."""
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    entries, damaged = [], []
    position = start
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        position += len(line) + 1
        try:
            entry = Entry(**json.loads(line))
            entries.append((_checked(entry), position))
        except (ValueError, TypeError, AttributeError):
            damaged.append(number)
    return entries, position, damaged


def _checked(entry: Entry) -> Entry:
    values = (*entry.metrics.values(), entry.step, entry.time_ms)
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError
    return entry
