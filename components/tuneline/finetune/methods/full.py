"""Full fine-tuning: every parameter trains.

Costs 16 bytes of memory per parameter in fp32 (weights, gradients and AdamW's two moments) before
activations, and the result is as large as the base. The learning rate is the one of Llama 2's
supervised fine-tuning (Touvron et al. 2023, section 3.1).

Embeddings that are tied to the output layer stay one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tuneline.finetune.methods.method import Method, MethodSettings

if TYPE_CHECKING:
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


METHOD = Method(
    name="full",
    title="Full fine-tuning: every parameter",
    config_class=FullSettings,
    learning_rate=2e-5,
    attach=attach,
    save=save,
    stored_as="model",
    works_on_4bit=False,
    side_by_side=False,
    loader="transformers",
)
