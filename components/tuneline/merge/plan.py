"""Which tensor goes into which file, and what happens to it on the way.

The plan is made from headers alone, so that a fault is found before a byte is written, and two
processes that plan the same merge write the same files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tuneline.errors import MergeError
from tuneline.finetune.methods.method import Quantization, TensorChange
from tuneline.merge.stored import FLOATS, ITEM_BYTES, StoredModel, StoredTensor
from tuneline.recipe import ExportSection

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
CODES: Final = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


class NoSuchTensorError(MergeError):
    """The adapter changes what the base's files don't have."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredTensor
    """The base's; of one that the adapter adds, what it starts from."""
    change: TensorChange | None = None
    through: Quantization | None = None
    """The base weight goes through 4 bits and back first."""
    turned: bool = False
    """The file has the weight of a linear layer as (inputs, outputs): Conv1D."""
    change_turned: bool = False
    """It is turned and the change is of (outputs, inputs): trained on 4 bits, where Conv1D is a
    linear layer like others."""
    into: Quantization | None = None
    """Written in 4 bits."""

    @property
    def size_bytes(self) -> int:
        """In the output; of a 4-bit tensor about that, with its scales."""
        if self.into is not None:
            return math.ceil(math.prod(self.shape) * (0.516 if self.into.double else 0.563))
        if (self.dtype, self.shape) == (self.stored.dtype, self.stored.shape):
            return self.stored.size_bytes
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_carried(self) -> bool:
        """Whether the bytes stay as they are."""
        return (
            self.change is None
            and self.through is None
            and self.into is None
            and self.dtype == self.stored.dtype
        )


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    """Empty where it is only known when the tensors are (4 bits)."""
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """The whole output."""

    files: tuple[PlannedFile, ...]
    changed: frozenset[str]
    """Names of the output's tensors that the adapter changes."""
    vocabulary: int | None
    """Rows of the embeddings, where the adapter resized them."""
    unties: bool
    """Output layer and embeddings were one tensor and become two."""


@dataclass(frozen=True)
class Embeddings:
    """How a model names its embeddings and its output layer."""

    inputs: str
    outputs: str
    tied: bool


def plan_merge(
    model: StoredModel,
    changes: Mapping[str, TensorChange],
    export: ExportSection,
    *,
    embeddings: Embeddings,
    four_bit: Mapping[str, bool],
    through: Quantization | None = None,
    trained_on_4bit: bool = False,
) -> Plan:
    """Decide every tensor's way.

    Args:
        model: the base's files.
        changes: of the adapter, by names in the model.
        export: dtype, 4 bits, size of the files.
        embeddings: of the model.
        four_bit: weights that are linear layers in 4 bits -> whether they are turned around.
        through: the base's weights of `four_bit` are taken as 4 bits represent them.
        trained_on_4bit: the changes are of the layers that a base in 4 bits has.

    Raises:
        NoSuchTensorError: the base has no tensor that the adapter changes.
        MergeError: a tensor does not fit, or is stored in a form that can't be changed.
    """
    names = _names_in_files([*changes, *four_bit, embeddings.inputs, embeddings.outputs], model)
    own = {names.get(name, name): change for name, change in changes.items()}
    own, unties = _untie(own, model, embeddings, names)
    inputs, outputs = (names.get(n, n) for n in (embeddings.inputs, embeddings.outputs))
    missing = [
        name
        for name, change in own.items()
        if name not in model.tensors and not change.optional and not (unties and name == outputs)
    ]
    into = Quantization() if export.quantization == "nf4" else None
    turned = {names.get(name, name): value for name, value in four_bit.items()}
    if through is not None or into is not None:
        missing += [name for name in turned if name not in model.tensors]
    if missing:
        raise NoSuchTensorError(
            f"the base's files have no tensor {sorted(missing)[0]} ({len(missing)} of {len(own)} "
            "that the adapter changes)"
        )

    def planned(tensor: StoredTensor, change: TensorChange | None) -> PlannedTensor:
        linear = tensor.name in turned
        return _planned(
            tensor,
            change,
            dtype=CODES.get(export.dtype, tensor.dtype),
            through=through if linear else None,
            into=into if linear else None,
            turned=turned.get(tensor.name, False),
            trained_on_4bit=trained_on_4bit,
        )

    files = [
        (file, [planned(tensor, own.get(tensor.name)) for tensor in file.tensors])
        for file in model.files
    ]
    if unties:
        added = replace(model.tensors[inputs], name=outputs)
        files[-1][1].append(planned(added, own.get(outputs)))
    changed = frozenset(own) & {tensor.name for _, tensors in files for tensor in tensors}
    head = own.get(inputs)
    return Plan(
        files=tuple(_files(files, export)),
        changed=changed | ({outputs} if unties else set()),
        vocabulary=head.shape[0] if head is not None and head.replaces else None,
        unties=unties,
    )


def _names_in_files(names: Iterable[str], model: StoredModel) -> dict[str, str]:
    """Checkpoints of a headless model leave out the first part of each name."""
    return {
        name: short
        for name in names
        if name not in model.tensors and (short := name.partition(".")[2]) in model.tensors
    }


def _untie(
    changes: dict[str, TensorChange],
    model: StoredModel,
    embeddings: Embeddings,
    names: Mapping[str, str],
) -> tuple[dict[str, TensorChange], bool]:
    inputs, outputs = (names.get(n, n) for n in (embeddings.inputs, embeddings.outputs))
    if not embeddings.tied or outputs in model.tensors:
        return changes, False
    head, tail = changes.get(inputs), changes.get(outputs)
    if head is None and tail is None:
        return changes, False
    if head is not None and head.tied_follows and (tail is None or _same(head, tail)):
        return {name: change for name, change in changes.items() if name != outputs}, False
    return changes, True


def _same(first: TensorChange, second: TensorChange) -> bool:
    import torch

    if first.shape != second.shape or not (first.replaces and second.replaces):
        return False
    rows = torch.empty(first.shape)
    return torch.equal(first.apply(rows, 0), second.apply(rows, 0))


def _planned(
    tensor: StoredTensor,
    change: TensorChange | None,
    *,
    dtype: str,
    through: Quantization | None,
    into: Quantization | None,
    turned: bool,
    trained_on_4bit: bool,
) -> PlannedTensor:
    if tensor.dtype not in FLOATS:
        if change is not None or through is not None:
            raise MergeError(
                f"{tensor.file.name}: tensor {tensor.name} is stored as {tensor.dtype}, which "
                f"can't be changed; these can: {', '.join(FLOATS)}. Use the base's own weights"
            )
        return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor)
    change_turned = turned and trained_on_4bit
    shape = tensor.shape[::-1] if change_turned else tensor.shape
    if change is not None and not change.fits(shape):
        raise MergeError(
            f"{tensor.name}: base shape {shape} is not the adapter's {change.shape}: the adapter "
            "belongs to another base"
        )
    if change is not None and change.replaces:
        shape = change.shape
    return PlannedTensor(
        name=tensor.name,
        dtype=dtype,
        shape=shape[::-1] if change_turned != (turned and into is not None) else shape,
        stored=tensor,
        change=change,
        through=through,
        turned=turned,
        change_turned=change_turned,
        into=into,
    )


def _files(
    files: list[tuple[Any, list[PlannedTensor]]], export: ExportSection
) -> Iterable[PlannedFile]:
    if export.max_shard_size_gb is None:
        for file, tensors in files:
            yield _file(file.path.name, tensors, file.metadata, file.header)
        return
    metadata = dict(files[0][0].metadata)
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in (tensor for _, tensors in files for tensor in tensors):
        if groups[-1] and filled + tensor.size_bytes > export.max_shard_size_gb * 1e9:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size_bytes
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE
        yield _file(name, tensors, metadata, b"")


def _file(
    name: str, tensors: list[PlannedTensor], metadata: Mapping[str, str], like: bytes
) -> PlannedFile:
    if any(tensor.into is not None for tensor in tensors):
        return PlannedFile(name, tuple(tensors), b"", metadata)
    # wider items first: readers map tensors, which have to lie at multiples of their item's size
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES.get(tensor.dtype, 1))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    if like and json.loads(like[8:]) == entries:
        header = like
    else:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
    return PlannedFile(name, tuple(ordered), header, metadata)
