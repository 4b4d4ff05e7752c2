"""Large artifacts of a run on a cluster go to an object store of the team's; what KFP hands on is
a note of where they are.

KFP's launcher uploads every output whole and downloads every input whole, through the object store
of its control plane, which is made for reports and adapters. With `TUNELINE_WEIGHTS` set, an
artifact beyond `LARGEST_BYTES` is sent below that prefix, in a place named by its digest, manifest
last; a folder with `stored.json` (place and digest) and its README takes its place. A step that
reads it brings it to its own disk, and verifies it as any artifact, and by the digest in the note.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

from tuneline import object_store
from tuneline.artifacts import MANIFEST
from tuneline.errors import ArtifactError, StorageError
from tuneline.progress import report

VARIABLE: Final = "TUNELINE_WEIGHTS"
LARGEST_BYTES: Final = 256 * 2**20
"""Adapters stay below it, and so do the models of demos."""
_NOTE: Final = "stored.json"
_STAYS: Final = ("README.md",)
"""What a page of KFP's shows."""


def leave(artifact: Path) -> str:
    """Send an artifact away if it is large; returns its URI, empty where it stays.

    It stays where the store can't be used: what took hours to make is not lost for that.

    Args:
        artifact: sealed, a step's output.
    """
    root = os.environ.get(VARIABLE, "").rstrip("/")
    if not root:
        return ""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    if sum(entry["size_bytes"] for entry in manifest["files"].values()) <= LARGEST_BYTES:
        return ""
    url = f"{root}/{manifest['digest'].removeprefix('sha256:')}"
    try:
        if not object_store.is_remote(root):
            raise StorageError(f"{VARIABLE} is {root}: name {object_store.SCHEME}bucket/prefix")
        object_store.send_artifact(artifact, url)
    except StorageError as error:
        report(f"warning: the weights go through KFP's own object store: {error}")
        return ""
    aside = artifact.with_name(f"{artifact.name}.note")
    aside.mkdir()
    for name in _STAYS:
        if (artifact / name).is_file():
            shutil.copyfile(artifact / name, aside / name)
    note = json.dumps({"url": url, "digest": manifest["digest"]}, indent=2)
    (aside / _NOTE).write_text(note + "\n", encoding="utf-8")
    shutil.rmtree(artifact)
    aside.rename(artifact)
    report(f"weights are at {url}")
    return url


def fetch(artifact: Path) -> Path:
    """The artifact's own folder: brought here if there is only a note of it.

    Raises:
        ArtifactError: what lies there is not what the note is about.
        StorageError: the store can't be reached, or has it not any more.
    """
    try:
        note = json.loads((artifact / _NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return artifact
    below = artifact.with_name(f"{artifact.name}.fetched")
    folder = object_store.fetch_folder(note["url"], below, ("*",))
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        found = "none"
    if found != note["digest"]:
        raise ArtifactError(
            f"{note['url']} has digest {found[:19]}, not {note['digest'][:19]}: it was changed or "
            "removed in part; run the step that made it again"
        )
    return folder
