"""The on-disk contract of every artifact: a folder of files with a manifest that proves them.

A folder is an artifact when it holds `manifest.json`; the manifest is written last, into a folder
aside (`NAME.partial`), which is then renamed. A killed step therefore leaves no artifact, and its
leftover is removed by the next try. Loading checks the kind, the format version, and the size and
SHA-256 of every file.

Layouts (paths inside the folder):

    prepared_dataset   {train,validation,test}-NNNNN.arrow, test_rows.jsonl, chat_template.jinja,
                       contract.json, contract.html
    adapter            adapter_config.json, adapter_model.safetensors (plain PEFT), history.jsonl
    base_scores        measured.json
    eval_report        scores.jsonl, task_scores.jsonl where there are tasks, report.json,
                       report.html
    leaderboard        leaderboard.json, leaderboard.html
    merged_model       config.json, *.safetensors, tokenizer files (plain transformers), proof.json
    packaged_model     the adapter's files, tokenizer files, loader.json, README.md

KFP creates the folder of an output artifact's parent only, and both runners hand a path that does
not exist yet; an empty folder at the path is accepted too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from tuneline import __version__
from tuneline.errors import ArtifactError, TunelineError

FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"

Kind = Literal[
    "prepared_dataset",
    "adapter",
    "base_scores",
    "eval_report",
    "leaderboard",
    "merged_model",
    "packaged_model",
]


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: size in bytes, SHA-256 as hex."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, and what it was made from."""

    kind: Kind
    format_version: int
    tuneline_version: str
    config: dict[str, Any]
    """The resolved configuration of the step that made it."""
    base_model: dict[str, str]
    """`reference` as the recipe names it, `revision`, `digest` of config and weights."""
    inputs: dict[str, str]
    """Digest of each input artifact, by its role."""
    files: dict[str, FileEntry]
    """Path inside the folder -> size and digest; the manifest itself is not listed."""

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest's content: the identity of the artifact."""
        return digest_of(asdict(self))


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The identity of the artifact."""
        return self.manifest.digest

    def read_json(self, name: str) -> Any:
        """The JSON file `name` of this artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def read_jsonl(self, name: str) -> list[Any]:
        """The rows of the JSON-lines file `name` of this artifact."""
        with (self.path / name).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-serializable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes as hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(folder: Path, hashed: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    names = {p.relative_to(folder).as_posix(): p for p in files}
    return {
        name: hashed.get(name) or FileEntry(p.stat().st_size, digest_of_file(p))
        for name, p in names.items()
    }


@contextmanager
def writing(
    output: Path, *, resumes: Callable[[Path], bool] = lambda aside: False
) -> Iterator[Path]:
    """A folder aside to write an artifact into; it becomes `output` when the block ends well.

    Args:
        output: folder of the artifact.
        resumes: whether what a try before has left aside is gone on with. Where it is given, a
            try that is interrupted leaves its work; one that fails for a stated reason does not.

    Raises:
        ArtifactError: `output` exists and is not empty, or its parent can't be written.
    """
    output = Path(os.path.realpath(output))  # a link to an empty folder is that folder
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ArtifactError(
            f"output {output} exists and is not empty: an artifact is never overwritten; "
            "name another folder or remove it first"
        )
    if output.is_mount():
        raise ArtifactError(f"output {output} is a mount point: name a new folder below it")
    aside = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists() and not resumes(aside):
            shutil.rmtree(aside)
        aside.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"output {output} can't be written ({error.strerror}): name a folder that can"
        ) from error
    try:
        yield aside
        if output.is_dir():
            output.rmdir()
        aside.rename(output)
    except BaseException as error:
        if isinstance(error, TunelineError) or not resumes(aside):
            shutil.rmtree(aside, ignore_errors=True)
        raise


def seal(
    folder: Path,
    *,
    kind: Kind,
    config: Mapping[str, Any],
    base_model: Mapping[str, str],
    inputs: Mapping[str, str],
    hashed: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Write the manifest of a finished folder, durably.

    Files in `hashed` were hashed while they were written and are not read again.

    Files are made readable for every user: weights savers leave mode 0600, which a pod that runs
    as another user could not read.
    """
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    manifest = Manifest(
        kind=kind,
        format_version=FORMAT_VERSION,
        tuneline_version=__version__,
        config=dict(config),
        base_model=dict(base_model),
        inputs=dict(inputs),
        files=_entries(folder, hashed or {}),
    )
    text = json.dumps(asdict(manifest) | {"digest": manifest.digest}, indent=2, ensure_ascii=False)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest


def load(path: Path, kind: Kind) -> Artifact:
    """Open and verify an artifact.

    Raises:
        ArtifactError: no manifest, another kind or format, or a file that is missing, added or
            differs from its digest.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is not a finished {kind}: it has no {MANIFEST}; "
            f"give the output folder of the step that makes a {kind}"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path / MANIFEST} can't be read: {error}") from error
    try:
        stated = raw.pop("digest")
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(files=files, **raw)
    except (AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is not a tuneline manifest: {error}") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{path} is a {manifest.kind}, this step reads a {kind}")
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {manifest.format_version}, this tuneline "
            f"({__version__}) reads {FORMAT_VERSION}: run the step again"
        )
    if manifest.digest != stated:
        raise ArtifactError(
            f"{path / MANIFEST} was changed after it was written: run the step again"
        )
    _verify_files(path, manifest)
    return Artifact(path, manifest)


def _verify_files(path: Path, manifest: Manifest) -> None:
    on_disk = {
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }
    faults = [f"{name} is missing" for name in sorted(manifest.files.keys() - on_disk)]
    faults += [f"{name} was added" for name in sorted(on_disk - manifest.files.keys())]
    for name, entry in manifest.files.items():
        if name not in on_disk:
            continue
        size = (path / name).stat().st_size
        if size != entry.size_bytes:
            faults.append(f"{name} has {size} bytes, not {entry.size_bytes}")
        elif digest_of_file(path / name) != entry.sha256:
            faults.append(f"{name} differs from its SHA-256")
    if faults:
        raise ArtifactError(f"{path} is damaged: {'; '.join(faults)}. Run its step again")
