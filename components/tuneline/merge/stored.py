"""Safetensors files as they lie on disk: which tensor is where.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes without gaps, in the
order of their offsets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline.base_model import weight_files
from tuneline.errors import MergeError

if TYPE_CHECKING:
    import torch

FLOATS: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What can be changed or converted; everything else is carried as it is."""
_COMPARED_BYTES: Final = 4 << 20
ITEM_BYTES: Final = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "U16": 2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    name: str
    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the file."""
    size_bytes: int


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its tensors in the order of their bytes."""

    path: Path
    header: bytes
    """The first bytes of the file, up to the first tensor."""
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class StoredModel:
    """The weights of a model folder."""

    files: tuple[StoredFile, ...]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name, in the files' order."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}


def read_model(folder: Path) -> StoredModel:
    """Read the headers of the files that transformers loads.

    Raises:
        MergeError: a file is damaged or missing.
    """
    return StoredModel(tuple(read_file(path) for path in weight_files(folder)))


def read_file(path: Path) -> StoredFile:
    """Read the header of one file.

    Raises:
        MergeError: it is no safetensors file, or cut short.
    """
    try:
        with path.open("rb") as reader:
            length = reader.read(8)
            header = reader.read(int.from_bytes(length, "little"))
            size = os.fstat(reader.fileno()).st_size
        entries: dict[str, Any] = json.loads(header)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise MergeError(
            f"{path} is no safetensors file ({error}): fetch the model again"
        ) from error
    metadata = entries.pop("__metadata__", {})
    base = 8 + len(header)
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if base + end > size:
            raise MergeError(f"{path} is cut short at tensor {name}: fetch the model again")
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(name, path, entry["dtype"], shape, base + start, end - start))
    return StoredFile(path, length + header, metadata, tuple(tensors))


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The whole tensor in its own dtype.

    Raises:
        MergeError: its dtype is none that this computes with, or the file became shorter.
    """
    import torch

    raw = torch.empty(stored.size_bytes, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as reader:
        read_into(reader.fileno(), raw, stored, 0)
    return raw.view(torch_dtype(stored)).reshape(stored.shape)


def read_into(descriptor: int, raw: torch.Tensor, stored: StoredTensor, offset: int) -> None:
    """Fill `raw` (uint8) with the tensor's bytes from `offset` on.

    Raises:
        MergeError: the file became shorter.
    """
    view = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType]  # arrays are buffers
    position = stored.start + offset
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise MergeError(f"{stored.file} became shorter while it was read")
        position += count
        view = view[count:]


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two files hold the same tensor, compared a few MB at a time."""
    if (one.dtype, one.shape, one.size_bytes) != (other.dtype, other.shape, other.size_bytes):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.size_bytes
        while left:
            size = min(left, _COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Of a floating-point tensor.

    Raises:
        MergeError: it is none of F32, BF16 and F16.
    """
    import torch

    if stored.dtype not in FLOATS:
        raise MergeError(
            f"{stored.file.name}: tensor {stored.name} is stored as {stored.dtype}; merging "
            f"computes with {', '.join(FLOATS)}: use the model's own full-precision weights"
        )
    return getattr(torch, FLOATS[stored.dtype])
