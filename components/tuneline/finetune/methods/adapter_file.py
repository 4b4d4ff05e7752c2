"""What PEFT's adapter folders hold beside a method's own tensors.

Whole modules that were trained with the adapter (`modules_to_save`), embeddings that were resized
for added tokens, trained rows of embeddings (`trainable_token_indices`), and biases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.errors import MergeError
from tuneline.finetune.methods.method import TensorChange

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")


def read_adapter(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors, by their names below the model.

    Raises:
        MergeError: a tensor is not below the model.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        if not key.startswith(_PREFIX):
            raise MergeError(f"{folder}: tensor {key} is no part of a PEFT adapter")
        tensors[key.removeprefix(_PREFIX)] = tensor
    return config, tensors


def added(offset: torch.Tensor) -> TensorChange:
    """The change of a bias, in fp32."""
    return TensorChange(
        shape=tuple(offset.shape),
        apply=lambda rows, first: rows.add_(offset[first : first + len(rows)]),
        delta=lambda: offset,
    )


def other_change(
    folder: str, config: dict[str, Any], key: str, tensor: torch.Tensor
) -> tuple[str, TensorChange]:
    """The change of a tensor that is not the method's own.

    Returns:
        Name of the base tensor, and its change.

    Raises:
        MergeError: it is nothing that can be merged.
    """
    for suffix in _TOKENS:
        if key.endswith(suffix):
            return _trained_rows(folder, config, key.removesuffix(suffix), tensor)
    module, _, kind = key.rpartition(".")
    module = module.removesuffix(".base_layer")
    if kind not in ("weight", "bias"):
        raise MergeError(
            f"{folder}: tensor {key} can't be merged: this merge knows low-rank changes, scales, "
            "biases, whole modules and trained tokens; export it with form packaged"
        )
    trained = any(module.split(".")[-1] == name.split(".")[-1] for name in _saved(config))
    return f"{module}.{kind}", TensorChange(
        shape=tuple(tensor.shape),
        apply=lambda rows, first: tensor[first : first + len(rows)].float(),
        replaces=True,
        # a module of modules_to_save is a copy, which leaves what was tied to it alone
        tied_follows=not trained or bool(config.get("ensure_weight_tying")),
    )


def _saved(config: dict[str, Any]) -> list[str]:
    return list(config.get("modules_to_save") or ())


def _trained_rows(
    folder: str, config: dict[str, Any], module: str, values: torch.Tensor
) -> tuple[str, TensorChange]:
    chosen = config.get("trainable_token_indices")
    if isinstance(chosen, dict):
        matching = [v for name, v in chosen.items() if module.split(".")[-1] == name.split(".")[-1]]
        chosen = matching[0] if matching else None
    if chosen is None or len(chosen) != len(values):
        raise MergeError(
            f"{folder}: {len(values)} trained rows of {module}, trainable_token_indices names "
            f"{len(chosen or ())}"
        )
    position = {int(index): row for row, index in enumerate(chosen)}

    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        for index, row in position.items():
            if first <= index < first + len(rows):
                rows[index - first] = values[row]
        return rows

    # the shape of the base is not known here: -1 stands for its own
    return f"{module}.weight", TensorChange(
        shape=(-1, values.shape[1]), apply=apply, tied_follows=True
    )
