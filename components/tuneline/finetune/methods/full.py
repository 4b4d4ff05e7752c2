"""Full fine-tuning: every parameter trains.

Costs 16 bytes of memory per parameter in fp32 (weights, gradients and AdamW's two moments) before
activations, and the result is as large as the base. The learning rate is the one of Llama 2's
supervised fine-tuning (Touvron et al. 2023, section 3.1).

Embeddings that are tied to the output layer stay one tensor. Merging takes each tensor as trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuneline.base_model import weight_files
from tuneline.errors import MergeError
from tuneline.finetune.methods.method import MergeTensor, Method, MethodSettings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class FullSettings(MethodSettings):
    """Full fine-tuning has no hyperparameters of its own."""

    name: Literal["full"] = "full"


def attach(model: PreTrainedModel, config: MethodSettings) -> PreTrainedModel:
    """Let every parameter train."""
    del config
    model.requires_grad_(True)
    return model


def save(model: PeftModel | PreTrainedModel, folder: str) -> None:
    """Write all weights as safetensors."""
    model.save_pretrained(folder)


def open_merge(adapter_dir: str) -> tuple[MergeTensor, frozenset[str]]:
    """The merge function of a folder of full weights: the trained tensor instead of the base's.

    Raises:
        MergeError: a tensor has another shape than the base's.
    """
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in weight_files(Path(adapter_dir)):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in where:
            return tensor  # a copy of a tied tensor, which loading takes from its other name
        with safe_open(where[name], framework="pt") as file:
            trained = file.get_tensor(name)
        if trained.shape != tensor.shape:
            raise MergeError(
                f"{name}: base shape {tuple(tensor.shape)} is not the trained one "
                f"{tuple(trained.shape)}: the weights belong to another base"
            )
        return trained.to(tensor.dtype)

    return merge, frozenset(where)


METHOD = Method(
    name="full",
    title="Full fine-tuning: every parameter",
    config_class=FullSettings,
    learning_rate=2e-5,
    attach=attach,
    save=save,
    open_merge=open_merge,
    stored_as="model",
    works_on_4bit=False,
    side_by_side=False,
    loader="transformers",
)
