"""A model that computes without being in memory: its weights are read block by block.

The model is built without weights; when a decoder block, the embeddings or the output layer is
called, its weights are read from the safetensors files as fp32, used, and let go. One forward pass
reads every weight once. The most that is held is the largest of these parts.

Some models name their tensors otherwise in memory than on disk (experts that are fused while
loading). Those are loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline.errors import MethodError
from tuneline.finetune.load import load_base, load_skeleton
from tuneline.finetune.methods.structure import decoder_blocks
from tuneline.merge.stored import StoredModel, StoredTensor, read_model, read_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Attach = Callable[["PreTrainedModel"], "nn.Module"]
ReadWeight = Callable[[str], "torch.Tensor"]
_TUNED: Final = "base_model.model."
"""Where PEFT puts the model."""


class Weights(Mapping[str, "torch.Tensor"]):
    """Every parameter of a model by its name in memory, read when it is asked for.

    Args:
        model: without weights.
        folder: with the files.

    Raises:
        KeyError: a parameter is in none of the files under its name.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        stored = read_model(folder)
        self._stored = {
            name: _find(name, twins, stored) for name, twins in _names_with_twins(model)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._stored[name]).float()

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter lies."""
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored


def _names_with_twins(model: PreTrainedModel) -> list[tuple[str, list[str]]]:
    """Each parameter's name, and the other names of the same one: tied weights are stored once."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    named = [(name, names) for names in by_id.values() for name in names]
    # buffers that are saved are parameters to the files
    saved = {n for n, _ in model.named_buffers()} & set(model.state_dict())
    return [*named, *((name, [name]) for name in saved)]


def _find(name: str, twins: list[str], stored: StoredModel) -> StoredTensor:
    for candidate in (name, *twins):
        for key in (candidate, candidate.partition(".")[2]):
            if key in stored.tensors:
                return stored.tensors[key]
    raise KeyError(name)


def plain_name(name: str) -> str:
    """The base's name of a parameter that lies under PEFT's layers."""
    name = name.removeprefix(_TUNED).replace(".base_layer.", ".").replace(".token_adapter.", ".")
    return name.replace(".original_module.", ".").replace(".modules_to_save.default.", ".")


def streamed(
    folder: Path,
    *,
    trust_code: bool = False,
    attach: Attach | None = None,
    read: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """A model of `folder` that reads its weights while it computes, in fp32.

    Args:
        folder: configuration and safetensors files.
        trust_code: run the folder's own Python code, whose pin was checked.
        attach: puts an adapter on it.
        read: changes a weight that was read, given its name.

    Returns:
        The streamed model, or a loaded one where streaming is not possible.

    Raises:
        ModelError: it can't be loaded.
    """
    import torch

    skeleton = load_skeleton(folder, trust_code=trust_code)
    try:
        weights = Weights(skeleton, folder)
        parts = [block.name for block in decoder_blocks(skeleton)]
    except (KeyError, MethodError):
        loaded = load_base(folder, trust_code=trust_code, dtype=torch.float32)
        if read is not None:
            with torch.no_grad():
                for name, parameter in loaded.named_parameters():
                    parameter.copy_(read(name, parameter))
        return (attach(loaded) if attach is not None else loaded).eval()
    with torch.no_grad():
        for name, buffer in skeleton.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
    inside = tuple(f"{block}." for block in parts)
    parts += [
        name
        for name, module in skeleton.named_modules()
        if name not in parts
        and not name.startswith(inside)
        and any(True for _ in module.parameters(recurse=False))
    ]
    absent = {id(parameter) for parameter in skeleton.parameters()}
    model = attach(skeleton) if attach is not None else skeleton
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def read_weight(name: str) -> torch.Tensor:
        plain = plain_name(name)
        value = weights[plain] if read is None else read(plain, weights[plain])
        return value.to(device)

    for part in parts:
        name = part if model is skeleton else f"{_TUNED}{part}"
        _read_when_called(model.get_submodule(name), name, read_weight, absent)
    for parameter in model.parameters():
        if id(parameter) not in absent:
            parameter.data = parameter.data.to(device=device, dtype=torch.float32)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()


def _read_when_called(module: nn.Module, name: str, read: ReadWeight, absent: set[int]) -> None:
    from torch import nn

    parameters = [
        (owner, key, f"{owner_name}.{key}", parameter)
        for owner_name, owner in module.named_modules(prefix=name)
        for key, parameter in owner.named_parameters(recurse=False)
        if id(parameter) in absent
    ]

    def enter(*_arguments: object) -> None:
        for owner, key, full_name, _ in parameters:
            value = nn.Parameter(read(full_name), requires_grad=False)
            owner.register_parameter(key, value)

    def leave(*_arguments: object) -> None:
        for owner, key, _, parameter in parameters:
            owner.register_parameter(key, parameter)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
