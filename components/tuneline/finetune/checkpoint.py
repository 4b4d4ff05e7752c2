"""Checkpoints that a killed run goes on from.

A checkpoint is a folder `step-NNNNNNNN`:

    model.safetensors   the trainable parameters by name; of a frozen base nothing
    optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json   as `transformers.Trainer` reads
    checkpoint.json     the marker: size and SHA-256 of each file, written last

It is written into a folder aside, every file and the folder itself are flushed to the disk, and
the folder is then renamed. Loading verifies size and digest; what is damaged or half is skipped
with a warning that names it, and the next older one is taken.

Where `TUNELINE_CHECKPOINTS` is a place in an object store, each is written to disk like that and
then sent (`checkpoint_store`); a run goes on from the newest of both.

The folder of a run comes from its content key: the digest of everything that decides what is
computed (data, resolved settings, base model, image, number of processes). A retried pod, and the
same command given again, find it without being told; another recipe never does. Its lock belongs
to one living process; a second one that computes the same waits for it (the lock of a lost node
outlives it on a shared volume), then works in a folder of its own, from the newest checkpoint of
them all.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tuneline import images
from tuneline.artifacts import FileEntry, digest_of, digest_of_file
from tuneline.checkpoints_root import ROOT_VARIABLE, local_root, remote_root
from tuneline.errors import StorageError, TrainingError
from tuneline.finetune.checkpoint_store import (
    MARKER,
    CheckpointStore,
    StoredCheckpoint,
    step_of,
    store_of,
    stored_name,
)
from tuneline.finetune.sharding import like
from tuneline.progress import report
from tuneline.settings import Settings

WEIGHTS: Final = "model.safetensors"
FORMAT_VERSION: Final = 1
_NAME: Final = re.compile(r"step-(\d{8})")
_LOCK: Final = "lock"
_PARTIAL: Final = ".partial"
_REPLACED: Final = ".replaced.partial"
LOCK_PATIENCE_SECONDS: Final = 120.0
"""A lost node's lock is given up by an NFS server after its lease, 90 s as a rule."""
_KEY_LENGTH: Final = 32


_POLICY_KEYS: Final = frozenset({"checkpoint_minutes", "save_total_limit", "keep_checkpoints"})
"""Of the training settings: they decide nothing of what is computed."""


def run_identity(
    base_digest: str, dataset_digest: str, method: Settings, training: Settings
) -> dict[str, Any]:
    """Everything that decides what a run computes: its content key is the digest of this."""
    return {
        "base_model": base_digest,
        "prepared_dataset": dataset_digest,
        "method": method.model_dump(mode="json"),
        "training": training.model_dump(mode="json", exclude=set(_POLICY_KEYS)),
        "image": images.GPU,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    notes: dict[str, Any]
    """What the trainer wants back beyond the state that transformers keeps."""
    stored_as: str
    """What it is called in the object store, if it is there: two that differ have two names."""


def folder_of(identity: Mapping[str, Any], output: Path) -> Path:
    """Where on disk the run of `identity` keeps its checkpoints.

    Args:
        identity: everything that decides what is computed, as plain JSON.
        output: of the step; the root is beside it unless `TUNELINE_CHECKPOINTS` names one.
    """
    root = local_root() or output.with_name(output.name + ".checkpoints")
    return root / _key(identity)


def _key(identity: Mapping[str, Any]) -> str:
    return digest_of(identity).removeprefix("sha256:")[:_KEY_LENGTH]


def checkpoints_of(
    identity: Mapping[str, Any], output: Path, *, limit: int, own: bool = True
) -> Checkpoints:
    """The checkpoints of the run of `identity`, on disk and in the object store if there is one.

    Args:
        identity: everything that decides what is computed, as plain JSON.
        output: of the step.
        limit: as in `Checkpoints`.
        own: as in `Checkpoints`.

    Raises:
        TrainingError: the folder can't be written.
        StorageError: the object store can't be reached, or can't be written.
    """
    store = store_of(_key(identity))
    if store is not None and own:
        store.open(identity)
    return Checkpoints(folder_of(identity, output), limit=limit, own=own, store=store)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run, as `folder_of` gives it.
        limit: how many of the newest to keep, beside the best.
        own: take the lock and clean up; False for the other processes of the same run, which only
            read.
        store: where they are sent to and come from, or None.
        patience_seconds: how long to wait for the lock of another process.

    Attributes:
        unsent: why the newest one is on this disk only, empty where it is not or need not be
            elsewhere.

    Raises:
        TrainingError: the folder can't be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int,
        own: bool = True,
        store: CheckpointStore | None = None,
        patience_seconds: float = LOCK_PATIENCE_SECONDS,
    ) -> None:
        self.folder = folder
        self._key = folder.name
        self.unsent = ""
        self._limit = limit
        self._store = store
        self._damaged: set[str] = set()
        """Names on disk and in the store of those that were skipped."""
        self._sound: dict[int, dict[str, Any]] = {}
        """Step -> notes of those on disk that this process wrote or verified."""
        self._lock: int | None = None
        self._brought: list[Path] = []
        if not own:
            return
        for number in itertools.count(1):
            self.folder = folder if number == 1 else folder.with_name(f"{folder.name}.{number}")
            with _stated(f"checkpoints can't be kept in {self.folder}"):
                if self._take_lock(patience_seconds if number == 1 else 0):
                    break
            report(f"warning: another process trains the same in {self.folder}")
        self._tidy()

    def _take_lock(self, patience_seconds: float) -> bool:
        deadline = time.monotonic() + patience_seconds
        waits = False
        while not self._try_lock():
            if time.monotonic() >= deadline:
                return False
            if not waits:
                report(
                    f"another process holds {self.folder}: waiting up to {patience_seconds:.0f} s "
                    "for it to end, then training goes on beside it"
                )
                waits = True
            time.sleep(0.5)
        return True

    def _try_lock(self) -> bool:
        path = self.folder / _LOCK
        self.folder.mkdir(parents=True, exist_ok=True)  # one that ended well removes it
        lock = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError:  # a file system without locks: as good as before there were any
            pass
        if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
            os.close(lock)
            return False
        self._lock = lock
        return True

    def _tidy(self) -> None:
        """Take what a kill left between two renames, and remove what it left half."""
        asides = [*self.folder.glob(f"*{_PARTIAL}")]
        # what was to come in place of another before what it was to replace
        for aside in sorted(asides, key=lambda path: path.name.endswith(_REPLACED)):
            name = aside.name.removesuffix(_REPLACED).removesuffix(_PARTIAL)
            path = self.folder / name
            if _NAME.fullmatch(name) and not path.exists() and (aside / MARKER).is_file():
                with suppress(*_DAMAGE):
                    _load(aside)
                    aside.rename(path)
                    continue
            shutil.rmtree(aside, ignore_errors=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock, which else ends with the process, however that ends.

        What was brought here for another process's run is removed: that one keeps its checkpoints.
        """
        for path in self._brought:
            shutil.rmtree(path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, verified; warns of each one that it has to skip.

        Raises:
            StorageError: the object store can't be reached: what it holds would be done anew.
        """
        stored = self._stored()
        beside = self._beside()
        here = {step_of(path.name) for path in self._paths()}
        for step in sorted(here | beside.keys() | {one.step for one in stored}, reverse=True):
            found = (
                self._on_disk(step)
                or self._from_beside(step, beside.get(step, []))
                or self._from_store(step, stored)
            )
            if found is None:
                continue
            if self._store is not None:  # of an earlier process that couldn't send it
                self._store.send(found.path)
            return found
        return None

    def find(self, step: int) -> Checkpoint | None:
        """The checkpoint of `step`, verified, or None if it is not there or damaged.

        Raises:
            StorageError: it is not on disk, and the object store can't be reached.
        """
        return self._on_disk(step) or self._from_store(step, self._stored())

    def same(self, found: Checkpoint, *, brings: bool) -> Checkpoint:
        """The checkpoint that the first process found, on the disk of this one's machine.

        Without an object store it is where the first process sees it, on a volume of all.

        Args:
            found: as the first process has it.
            brings: this process brings it to its machine, the others there come after it.

        Raises:
            StorageError: the object store can't be reached, or does not have it.
        """
        if self._store is None:
            return found
        if not brings:
            for path in (found.path, self.folder / found.path.name):
                if (path / MARKER).is_file() and stored_name(path) == found.stored_as:
                    return replace(found, path=path)
        mine = self._on_disk(found.step)
        if mine is None or mine.stored_as != found.stored_as:
            stored = [one for one in self._stored() if one.name == found.stored_as]
            mine = self._from_store(found.step, stored)
            if mine is not None and brings:
                self._brought.append(mine.path)
        if mine is None:
            raise StorageError(
                f"{self._store.url} does not have {found.stored_as}, which the first process goes "
                "on from: run it again"
            )
        return mine

    def _beside(self) -> dict[int, list[Path]]:
        """Step -> of other processes that compute, or computed, the same."""
        beside: dict[int, list[Path]] = {}
        for folder in self._siblings():
            for path in folder.glob("step-*"):
                if _NAME.fullmatch(path.name):
                    beside.setdefault(step_of(path.name), []).append(path)
        return beside

    def _siblings(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self._key)}(\.\d+)?")
        return [
            folder
            for folder in sorted(self.folder.parent.glob(f"{self._key}*"))
            if name.fullmatch(folder.name) and folder != self.folder
        ]

    def _from_beside(self, step: int, paths: list[Path]) -> Checkpoint | None:
        path = self.folder / _name(step)
        aside = path.with_name(path.name + _PARTIAL)
        for other in paths:
            with _stated(f"checkpoint {other} can't be brought to {path}"):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                try:
                    for file in other.iterdir():
                        _link(file, aside / file.name)
                except FileNotFoundError:  # its owner has just removed it
                    continue
                if _load_or_warn(aside, str(other)) is None:
                    continue
                _flush(aside)
                self._put_in_place(aside, path)
            return self._on_disk(step)
        return None

    def _stored(self) -> list[StoredCheckpoint]:
        if self._store is None:
            return []
        return [one for one in self._store.found() if one.is_complete]

    def _on_disk(self, step: int) -> Checkpoint | None:
        path = self.folder / _name(step)
        if not path.exists():
            return None
        found = _load_or_warn(path, str(path))
        if found is None:
            self._damaged.add(path.name)
            self._sound.pop(step, None)
        else:
            self._damaged.discard(path.name)  # one from beside has taken its place
            self._sound[step] = found.notes
        return found

    def _from_store(self, step: int, stored: list[StoredCheckpoint]) -> Checkpoint | None:
        path = self.folder / _name(step)
        for one in reversed(stored):
            if one.step == step and (found := self._fetched(one, path)) is not None:
                return found
        return None

    def _fetched(self, stored: StoredCheckpoint, path: Path) -> Checkpoint | None:
        assert self._store is not None
        place = f"{self._store.url}/{stored.name}"
        aside = path.with_name(path.name + _PARTIAL)
        report(f"fetching checkpoint {place}, {sum(stored.files.values()) / 1e9:.2f} GB")
        try:
            # a full disk is no damage: an older one would cost the work since
            with _stated(f"checkpoint {place} can't be brought to {path}"):
                shutil.rmtree(aside, ignore_errors=True)
                self._store.fetch(stored, aside)
                found = _load_or_warn(aside, place)
                if found is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    aside.rename(path)
                    _flush(self.folder)
                    self._damaged.discard(path.name)
                    return replace(found, path=path)
        except ValueError as error:
            report(f"warning: checkpoint {place} is skipped: {error}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._damaged.add(stored.name)
        return None

    def write(
        self, step: int, notes: Mapping[str, Any], fill: Callable[[Path], None], best: int | None
    ) -> None:
        """Write a checkpoint, send it, and remove those that are no longer kept.

        Hours of training don't end because a store is away: what can't be sent is on disk, is
        warned of, and is sent with the next one.

        Args:
            step: optimizer steps done.
            notes: plain JSON that comes back with the checkpoint.
            fill: writes the files into the folder that it is given.
            best: step of the checkpoint to keep however old it is.

        Raises:
            TrainingError: the disk is full or the folder can't be written; earlier checkpoints
                are as they were.
        """
        path = self.folder / _name(step)
        if self._sound.get(step) != notes or not path.exists():
            self._write(path, step, notes, fill)
            self._sound[step] = dict(notes)
        self._rotate(best)
        if self._store is not None:
            try:
                self._send(self._store, step, best)
                self.unsent = ""
            except (StorageError, OSError) as error:
                self.unsent = str(error)
                report(
                    f"warning: checkpoint {path} is on this disk only and is sent with the next "
                    f"one: {error}"
                )

    def _write(
        self, path: Path, step: int, notes: Mapping[str, Any], fill: Callable[[Path], None]
    ) -> None:
        aside = path.with_name(path.name + _PARTIAL)
        try:
            with _stated(f"checkpoint {path} can't be written", self.standing):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                fill(aside)
                _mark_complete(aside, step, notes)
                self._put_in_place(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._damaged.discard(path.name)

    def _put_in_place(self, aside: Path, path: Path) -> None:
        """Where there is one of the same step, a complete one is on disk at any moment."""
        replaced = path.with_name(path.name + _REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        try:
            aside.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        _flush(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _send(self, store: CheckpointStore, written: int, best: int | None) -> None:
        stored = store.found()
        # first: a file that the store holds is taken for sent, though it is damaged
        store.remove([one for one in stored if one.name in self._damaged])
        there = {one.step for one in stored if one.is_complete and one.name not in self._damaged}
        here = {step_of(path.name): path for path in self._paths()}
        kept = set(sorted(there | here.keys())[-self._limit :])
        if best is not None:
            kept.add(best)
        for step in sorted(kept & here.keys(), reverse=True):  # the newest first: time may be short
            # an earlier one may lie here from another process, which nobody has looked at
            if step == written or (step not in there and self._on_disk(step) is not None):
                store.send(here[step])
        stored = store.found()
        latest = {one.step: one.name for one in stored if one.is_complete}
        latest[written] = stored_name(here[written])  # a store's clock tells no two of a second
        names = {name for step, name in latest.items() if step in kept}
        # a half one of a later step may be on its way from another process
        store.remove([o for o in stored if o.name not in names and o.step <= written])

    def standing(self) -> str:
        """What there is to go on from, as part of a sentence."""
        paths = self._paths()
        if paths:
            return f"the last complete one is {paths[-1].name}"
        return f"the last one is in {self._store.url}, if any" if self._store else "there is none"

    def _rotate(self, best: int | None) -> None:
        paths = self._paths()
        sound = [path.name for path in paths if path.name not in self._damaged]
        kept = set(sound[-self._limit :])
        if best is not None:
            kept.add(_name(best))
        for path in paths:
            if path.name not in kept:
                # first no longer a checkpoint, then gone: a kill in between leaves no half one
                doomed = path.with_name(path.name + _PARTIAL)
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def discard(self) -> None:
        """Remove all of them, also what ended processes left beside: the run has its result."""
        if self._store is not None:
            try:
                self._store.clear()
            except StorageError as error:
                report(f"warning: the checkpoints in {self._store.url} are left there: {error}")
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._siblings():
            with suppress(OSError), _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
        root = self.folder.parent
        # the root beside an output is ours alone; one that was named, a mount perhaps, stays
        if ROOT_VARIABLE not in os.environ and root.is_dir() and not any(root.iterdir()):
            root.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))


def _name(step: int) -> str:
    return f"step-{step:08d}"


@contextmanager
def _stated(what: str, standing: Callable[[], str] | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        known = f"; {standing()}" if standing else ""
        variable = ROOT_VARIABLE if remote_root() is None else "TUNELINE_CACHE"
        raise TrainingError(
            f"{what} ({reason}){known}: free space, or name another place in {variable}, "
            "then run again to go on"
        ) from error


def _mark_complete(folder: Path, step: int, notes: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        _flush(path)
        files[path.name] = asdict(FileEntry(path.stat().st_size, digest_of_file(path)))
    marker = {"format_version": FORMAT_VERSION, "step": step, "notes": notes, "files": files}
    with (folder / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder / _LOCK, os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _link(file: Path, target: Path) -> None:
    """As if copied: a file of a checkpoint never changes."""
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(file, target)
        _flush(target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_or_warn(path: Path, place: str) -> Checkpoint | None:
    try:
        return _load(path)
    except _DAMAGE as error:
        report(f"warning: checkpoint {place} is skipped: {error}")
        return None


_DAMAGE: Final = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged checkpoint can raise."""


def _load(path: Path) -> Checkpoint:
    if not (path / MARKER).is_file():
        raise ValueError(f"it is half: {MARKER} is missing")
    marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    if marker["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it has format version {marker['format_version']}, not {FORMAT_VERSION}")
    for name, entry in marker["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != entry["size_bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, not {entry['size_bytes']}")
        if digest_of_file(file) != entry["sha256"]:
            raise ValueError(f"{name} differs from its SHA-256")
    return Checkpoint(path, int(marker["step"]), dict(marker["notes"]), stored_name(path))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trainable(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `trainable` gives.

    Raises:
        TrainingError: one of them is not finite, so that nothing could go on from it.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise TrainingError(f"{name} is not finite: lower training.learning_rate")
        tensors[name] = parameter.to("cpu").contiguous()
    save_file(tensors, folder / WEIGHTS)


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Put the parameters of a checkpoint back.

    Raises:
        TrainingError: the checkpoint has other parameters than the model trains.
    """
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if names != targets.keys():
            example = sorted(names ^ targets.keys())[0]
            raise TrainingError(
                f"checkpoint {folder} is of another model or method ({example} is in one of them "
                "only): remove it"
            )
        for name, parameter in targets.items():
            parameter.copy_(like(parameter, file.get_tensor(name)))


def save_state(folder: Path, name: str, state: Any) -> None:
    """`torch.save`, with a full disk as the OSError that it is."""
    try:
        with (folder / name).open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's zip writer hides the file's own error
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        if "writ" in str(error):
            raise OSError(0, f"{name}: {str(error).splitlines()[0]}") from error
        raise


class Schedule:
    """When the next checkpoint is due by the clock.

    Args:
        minutes: between two; a lost process costs no more than these.
    """

    _MOST_SHARE: Final = 0.05
    """Of the time at most, however large the checkpoint."""

    def __init__(self, minutes: float) -> None:
        self._interval_seconds = minutes * 60
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the interval is over."""
        return time.monotonic() - self._last >= self._interval_seconds

    def wrote(self, seconds: float) -> None:
        """A checkpoint was written and took so long."""
        self._interval_seconds = max(self._interval_seconds, seconds / self._MOST_SHARE)
        self._last = time.monotonic()
