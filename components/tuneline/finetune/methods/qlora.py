"""QLoRA: LoRA over a base that is frozen in 4 bits.

The base's weights are kept as NF4, 16 levels at the quantiles of a normal distribution in blocks
of 64 with one scale each; double quantization stores the scales in 8 bits. Each product
dequantizes its weight to the compute dtype. Dettmers et al. 2023, "QLoRA: Efficient Finetuning of
Quantized LLMs", sections 3 and 4; all linear layers are adapted since the paper found that needed
to match full fine-tuning (section 4), and the learning rate is the paper's for models of up to 13B
(table 9; 1e-4 above).

Optimizer state is paged to host memory when the accelerator runs short (section 3, "Paged
Optimizers"); without an accelerator there is nothing to page. Compute is bf16 on accelerators that
have it, fp32 on CPUs.

The adapter was trained on the 4-bit base, so that is what it is evaluated on and, dequantized,
what it is merged into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuneline.finetune.methods.lora import ALL_LINEAR, LowRankSettings, attach_low_rank, open_merge
from tuneline.finetune.methods.method import Method, MethodSettings, Quantization

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


class QloraSettings(LowRankSettings):
    """Hyperparameters of QLoRA."""

    name: Literal["qlora"] = "qlora"
    target_modules: tuple[str, ...] = Field(default=(ALL_LINEAR,), min_length=1)
    """Names of the linear modules to adapt; or ["query-value"], however the model calls them; or
    ["all-linear"] for each one but the output layer."""
    double_quantization: bool = True
    """Quantize the scales too: 0.37 bits less per weight."""
    paged_optimizer: bool = True
    """AdamW whose state can move to host memory."""

    @property
    def quantization(self) -> Quantization:
        """Always NF4."""
        return Quantization(double=self.double_quantization)


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Add LoRA branches to a base that was loaded in 4 bits.

    Raises:
        MethodError: a target names no linear module, or `layers` is out of range.
    """
    assert isinstance(config, QloraSettings)
    return attach_low_rank(model, config, "qlora")


def create_optimizer(
    model: PeftModel | PreTrainedModel,
    config: MethodSettings,
    optimizer_class: type[Optimizer],
    options: dict[str, Any],
) -> Optimizer | None:
    """AdamW of bitsandbytes with 32-bit state, paged where there is an accelerator to page from."""
    del optimizer_class
    assert isinstance(config, QloraSettings)
    if not config.paged_optimizer:
        return None
    import torch
    from bitsandbytes.optim.adamw import AdamW32bit, PagedAdamW32bit

    chosen = PagedAdamW32bit if torch.cuda.is_available() else AdamW32bit
    keys = ("lr", "betas", "eps", "weight_decay")
    return chosen(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        **{key: options[key] for key in keys if key in options},
    )


METHOD = Method(
    name="qlora",
    title="QLoRA: LoRA over a base frozen in 4 bits",
    config_class=QloraSettings,
    learning_rate=2e-4,
    attach=attach,
    create_optimizer=create_optimizer,
    open_merge=open_merge,
    gradient_checkpointing=True,
    form=("rank", "alpha", "dropout", "target_modules"),
)
