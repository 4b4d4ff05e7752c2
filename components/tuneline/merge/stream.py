"""Write planned files, a few rows at a time.

Memory holds a handful of buffers of some MB, whatever the size of tensors, files and model; only
4-bit weights and DoRA on transposed layers need a whole tensor. Hashing and writing run beside the
arithmetic, each in a thread of its own, and the disk is kept busy from the start instead of being
flushed at the end.

A file is written beside its name, flushed to disk, renamed, and then noted with its digest in the
journal, so that a merge that was killed goes on after the last noted file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline.artifacts import FileEntry, digest_of_file
from tuneline.errors import MergeError
from tuneline.merge.four_bit import dequantized, quantized_tensors
from tuneline.merge.plan import PlannedFile, PlannedTensor
from tuneline.merge.stored import FLOATS, read_into, read_tensor, torch_dtype

if TYPE_CHECKING:
    import torch

JOURNAL: Final = "merge.journal"
_LOCK: Final = "merge.lock"
_CHUNK_ELEMENTS: Final = 1 << 20
"""Of work at a time: 4 MB in fp32, which stays in the CPU's cache."""
_CHUNK_BYTES: Final = 4 << 20
_BUFFERS: Final = 8
_SYNC_BYTES: Final = 128 << 20
"""Written between two flushes to disk; also what a container's memory is charged for."""


class Journal:
    """Which files of an output are finished, kept beside them.

    It is one process's at a time: a pod that was taken for lost may still be writing.

    Args:
        folder: of the output.
        key: of the merge; the notes of another are forgotten, and its files removed.

    Raises:
        BlockingIOError: another process is merging into this folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / JOURNAL
        self._key = key
        self._lock = (folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise BlockingIOError(
                f"another process is merging into {folder}: wait until it ends, or stop it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise
        self.finished: dict[str, FileEntry] = {}
        if self.belongs(folder, key):
            lines = self._path.read_text(encoding="utf-8").splitlines()[1:]
            for line in lines:
                if not line.endswith("}"):  # the kill came while it was written
                    break
                entry = json.loads(line)
                name = entry.pop("name")
                if (folder / name).is_file() and (folder / name).stat().st_size == entry[
                    "size_bytes"
                ]:
                    self.finished[name] = FileEntry(**entry)
        for file in folder.iterdir():
            if file.name not in (*self.finished, JOURNAL, _LOCK):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self._rewrite()

    @staticmethod
    def belongs(folder: Path, key: str) -> bool:
        """Whether the folder holds the work of a merge with this key."""
        try:
            with (folder / JOURNAL).open(encoding="utf-8") as file:
                return file.readline().strip() == key
        except OSError:
            return False

    def add(self, name: str, entry: FileEntry) -> None:
        """Note a file that is on disk for good."""
        self.finished[name] = entry
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **asdict(entry)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def complete(self) -> None:
        """The output is complete: no journal is needed."""
        self._path.unlink()
        self._path.with_name(_LOCK).unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _rewrite(self) -> None:
        lines = [json.dumps({"name": n, **asdict(e)}) for n, e in self.finished.items()]
        aside = self._path.with_suffix(".aside")
        aside.write_text("\n".join([self._key, *lines]) + "\n", encoding="utf-8")
        aside.rename(self._path)


def write_files(
    files: tuple[PlannedFile, ...],
    folder: Path,
    journal: Journal,
    on_tensor: Callable[[PlannedTensor], None] = lambda tensor: None,
) -> None:
    """Write those of the files that the journal does not have.

    Args:
        files: as planned.
        folder: of the output.
        journal: of that folder.
        on_tensor: called after each tensor; what it raises ends the work.

    Raises:
        MergeError: the base can't be read, or a merged value is not finite.
    """
    for file in files:
        if file.name in journal.finished:
            continue
        target = folder / file.name
        aside = target.with_name(f"{file.name}.partial")
        entry = _write(file, aside, on_tensor)
        aside.rename(target)
        _sync_folder(folder)
        journal.add(file.name, entry)


def _write(file: PlannedFile, path: Path, on_tensor: Callable[[PlannedTensor], None]) -> FileEntry:
    if not file.header:
        return _write_with_4bit(file, path, on_tensor)
    with _Sink(path) as sink, _Sources() as sources:
        sink.put(file.header)
        for tensor in file.tensors:
            _stream(tensor, sink, sources)
            on_tensor(tensor)
        return sink.finish()


def _write_with_4bit(
    file: PlannedFile, path: Path, on_tensor: Callable[[PlannedTensor], None]
) -> FileEntry:
    # sizes of 4-bit tensors' parts are known after quantizing only; the whole file is at most
    # about a third of the base's
    from safetensors.torch import save_file

    parts: dict[str, torch.Tensor] = {}
    for tensor in file.tensors:
        if tensor.into is not None:
            parts |= quantized_tensors(tensor.name, merged_whole(tensor), tensor.into)
        elif tensor.is_carried:
            parts[tensor.name] = _carried(tensor)
        else:
            parts[tensor.name] = merged_whole(tensor).to(_output_dtype(tensor)).contiguous()
        on_tensor(tensor)
    save_file(parts, path, dict(file.metadata) or None)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return FileEntry(path.stat().st_size, digest_of_file(path))


def _carried(tensor: PlannedTensor) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(tensor.stored.file, "pt") as reader:
        return reader.get_tensor(tensor.stored.name)


def _output_dtype(tensor: PlannedTensor) -> torch.dtype:
    import torch

    return getattr(torch, FLOATS[tensor.dtype])


def merged_whole(tensor: PlannedTensor) -> torch.Tensor:
    """The merged tensor in fp32; of one that becomes 4 bits as (outputs, inputs)."""
    weight = read_tensor(tensor.stored).float()
    if tensor.change_turned:
        weight = weight.T.contiguous()
    if tensor.through is not None:
        weight = dequantized(weight, tensor.through)
    if tensor.change is not None:
        if tensor.change.replaces:
            weight = weight.new_empty(tensor.change.shape)
        weight = tensor.change.apply(weight, 0)
    wanted_turned = tensor.turned and tensor.into is not None
    return weight.T.contiguous() if tensor.change_turned != wanted_turned else weight


def _stream(tensor: PlannedTensor, sink: _Sink, sources: _Sources) -> None:
    change, stored, shape = tensor.change, tensor.stored, tensor.shape or (1,)
    descriptor = sources.descriptor(stored.file)
    if tensor.is_carried:
        for start in range(0, stored.size_bytes, _CHUNK_BYTES):
            raw = sink.buffer(min(_CHUNK_BYTES, stored.size_bytes - start))
            read_into(descriptor, raw, stored, start)
            sink.write(raw)
        return
    dtype = _output_dtype(tensor)
    by_rows = change is None or change.by_rows
    if tensor.through is not None or tensor.change_turned or not by_rows:
        for part in merged_whole(tensor).flatten().split(_CHUNK_ELEMENTS):
            sink.write_as(part, dtype, tensor.name)
        return
    own = torch_dtype(stored)
    width = math.prod(shape[1:])
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    with _one_thread():
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            rows = sources.rows(count * width)
            if change is None or not change.replaces:
                raw = sources.raw(count * width * own.itemsize)
                read_into(descriptor, raw, stored, first * width * own.itemsize)
                rows.copy_(raw.view(own))
            rows = rows.view(count, *shape[1:])
            if change is not None:
                rows = change.apply(rows, first)
            sink.write_as(rows, dtype, tensor.name)


@contextmanager
def _one_thread() -> Iterator[None]:
    # torch's threads wait for each other after every operation on a chunk, which took three times
    # as long on two cores that also hash and write
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Sources:
    """Open files of the base, and scratch memory that is used again for every chunk."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._scratch: dict[str, torch.Tensor] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def raw(self, size_bytes: int) -> torch.Tensor:
        import torch

        return self._take("raw", size_bytes, torch.uint8)

    def rows(self, elements: int) -> torch.Tensor:
        import torch

        return self._take("rows", elements, torch.float32)

    def _take(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = torch.empty(size, dtype=dtype)
        return held[:size]


class _Sink:
    """A new file that is hashed and written beside the caller's work."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._unsynced_bytes = 0
        self._buffers: list[torch.Tensor | None] = [None] * _BUFFERS
        self._pending: list[list[Future[None]]] = [[] for _ in range(_BUFFERS)]
        self._next = 0
        self._workers = [ThreadPoolExecutor(1) for _ in range(3)]
        self._sync: Future[None] | None = None

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)
        self._file.close()

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """The next free buffer, uint8; waits until one is."""
        import torch

        self._wait(self._next)
        held = self._buffers[self._next]
        if held is None or held.numel() < size_bytes:
            held = self._buffers[self._next] = torch.empty(size_bytes, dtype=torch.uint8)
        return held[:size_bytes]

    def write(self, raw: torch.Tensor) -> None:
        """Hand over what `buffer` gave."""
        view = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType]  # arrays are buffers
        hashing, writing, _ = self._workers
        self._pending[self._next] = [
            hashing.submit(self._hash.update, view),
            writing.submit(self._append, view),
        ]
        self._size_bytes += len(view)
        self._next = (self._next + 1) % _BUFFERS

    def write_as(self, rows: torch.Tensor, dtype: torch.dtype, name: str) -> None:
        """Convert and hand over.

        Raises:
            MergeError: a value is not finite, or `dtype` can't hold it.
        """
        import torch

        largest = torch.finfo(dtype).max
        low, high = torch.aminmax(rows) if rows.numel() else (0.0, 0.0)
        if not (-largest <= float(low) and float(high) <= largest):
            raise MergeError(
                f"{name}: merged values go from {float(low):.3g} to {float(high):.3g}, "
                f"{str(dtype).removeprefix('torch.')} holds up to {largest:.3g}: choose another "
                "export.dtype, or train with a lower learning rate if they are not finite"
            )
        raw = self.buffer(rows.numel() * dtype.itemsize)
        raw.view(dtype).copy_(rows.flatten())
        self.write(raw)

    def put(self, data: bytes) -> None:
        """Append a few bytes at once."""
        self._hash.update(data)
        self._append(memoryview(data))
        self._size_bytes += len(data)

    def finish(self) -> FileEntry:
        """Wait until everything is on disk."""
        for index in range(_BUFFERS):
            self._wait(index)
        if self._sync is not None:
            self._sync.result()
        os.fsync(self._file.fileno())
        return FileEntry(self._size_bytes, self._hash.hexdigest())

    def _wait(self, index: int) -> None:
        for future in self._pending[index]:
            future.result()
        self._pending[index] = []

    def _append(self, view: memoryview) -> None:
        self._unsynced_bytes += len(view)
        while view:
            view = view[self._file.write(view) :]
        if self._unsynced_bytes >= _SYNC_BYTES:
            if self._sync is not None:
                self._sync.result()
            self._sync = self._workers[2].submit(os.fdatasync, self._file.fileno())
            self._unsynced_bytes = 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
