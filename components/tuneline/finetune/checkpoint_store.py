"""The checkpoints of a run in an object store: what a pod finds that has an empty disk.

Below `TUNELINE_CHECKPOINTS/KEY` of the run lie

    run.json                                what decides the result, for whoever looks there
    step-NNNNNNNN-DDDDDDDDDDDD/FILE         of a checkpoint, as on disk
    step-NNNNNNNN-DDDDDDDDDDDD/checkpoint.json   its marker, sent last and removed first

The second part of the name is of the marker's SHA-256, and the marker holds the digests of all
files: a prefix never gets other content than it had, so that two processes that train the same
(a pod that was given up but still lives) can't mix their files into one checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from tuneline import object_store
from tuneline.artifacts import FileEntry
from tuneline.checkpoints_root import ROOT_VARIABLE, remote_root
from tuneline.errors import StorageError

MARKER: Final = "checkpoint.json"
RUN: Final = "run.json"
_STEP: Final = re.compile(r"step-(\d{8})")
_KEY: Final = re.compile(r"(step-\d{8}-[0-9a-f]{12})/(.+)")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One in the store.

    Attributes:
        name: of its prefix below the run's.
        step: optimizer steps done.
        files: name -> size in bytes; with the marker if it is complete.
        written: when the last of them was.
    """

    name: str
    step: int
    files: dict[str, int]
    written: datetime

    @property
    def is_complete(self) -> bool:
        """Whether its marker was sent."""
        return MARKER in self.files


class CheckpointStore:
    """The checkpoints of one run below `TUNELINE_CHECKPOINTS`.

    Every method raises StorageError if the store can't be reached or refuses.

    Args:
        url: of the run, `s3://bucket/prefix/KEY`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = object_store.Folder(url, hurried=True)

    def open(self, identity: Mapping[str, Any]) -> None:
        """Write what the run is: a place that can't be written is known before training.

        Raises:
            StorageError: says what to do.
        """
        try:
            self._folder.entries(RUN)  # some stores make a bucket that is written to
            self._folder.write(RUN, json.dumps(identity, indent=2, sort_keys=True).encode())
        except StorageError as error:
            raise StorageError(
                f"checkpoints can't be kept in {ROOT_VARIABLE}={remote_root()}: {error}: check the "
                "bucket, AWS_ENDPOINT_URL and the credentials, or name another place"
            ) from error

    def found(self) -> list[StoredCheckpoint]:
        """All of them, half ones too, the newest last."""
        files: dict[str, dict[str, int]] = {}
        written: dict[str, datetime] = {}
        for key, entry in self._folder.entries("step-").items():
            if match := _KEY.fullmatch(key):
                name, file = match.groups()
                files.setdefault(name, {})[file] = entry["Size"]
                written[name] = max(written.get(name, entry["LastModified"]), entry["LastModified"])
        checkpoints = [
            StoredCheckpoint(name, step_of(name), files[name], written[name]) for name in files
        ]
        return sorted(checkpoints, key=lambda one: (one.step, one.written))

    def send(self, path: Path) -> None:
        """Send a complete checkpoint from disk; what is there already is not sent again."""
        marker = (path / MARKER).read_bytes()
        name = stored_name(path)
        there = self._folder.entries(f"{name}/")
        if f"{name}/{MARKER}" in there:
            return
        files = {n: FileEntry(**entry) for n, entry in json.loads(marker)["files"].items()}
        self._folder.send(path, files, f"{name}/", there)
        self._folder.write(f"{name}/{MARKER}", marker)

    def fetch(self, stored: StoredCheckpoint, folder: Path) -> None:
        """Bring one to disk, as it is: whoever loads it verifies it.

        Raises:
            ValueError: it is damaged, which is known before anything large is brought.
        """
        marker = self._folder.read(f"{stored.name}/{MARKER}") or b""
        try:
            sizes = {n: entry["size_bytes"] for n, entry in json.loads(marker)["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{MARKER} is none: {error}") from error
        for name, size in sizes.items():
            if "/" in name or not object_store.is_plain(name):
                raise ValueError(f"{name} is no name of a file")
            if name not in stored.files:
                raise ValueError(f"{name} is missing")
            if stored.files[name] != size:
                raise ValueError(f"{name} has {stored.files[name]} bytes, not {size}")
        if _stored_name(stored.step, marker) != stored.name:
            raise ValueError(f"{MARKER} is not the one that was sent")
        folder.mkdir(parents=True)
        for name in sizes:
            self._folder.fetch(f"{stored.name}/{name}", folder / name)
        (folder / MARKER).write_bytes(marker)

    def remove(self, checkpoints: Collection[StoredCheckpoint]) -> None:
        """First they are no checkpoints any more, then they are gone."""
        for one in checkpoints:
            rest = sorted(one.files.keys() - {MARKER})
            self._folder.remove([f"{one.name}/{file}" for file in (MARKER, *rest)])

    def clear(self) -> None:
        """Remove all that the run has left here."""
        self.remove(self.found())
        self._folder.remove([RUN])
        self._folder.abort_uploads()


def store_of(key: str) -> CheckpointStore | None:
    """Of the run with this key, or None where checkpoints stay on disk.

    Raises:
        StorageError: no store is reached by what `TUNELINE_CHECKPOINTS` names.
    """
    root = remote_root()
    return None if root is None else CheckpointStore(f"{root}/{key}")


def stored_name(path: Path) -> str:
    """What a checkpoint on disk is called in the store."""
    return _stored_name(step_of(path.name), (path / MARKER).read_bytes())


def _stored_name(step: int, marker: bytes) -> str:
    return f"step-{step:08d}-{hashlib.sha256(marker).hexdigest()[:12]}"


def step_of(name: str) -> int:
    """The step in the name of a checkpoint, on disk or in the store."""
    match = _STEP.match(name)
    assert match is not None
    return int(match[1])
