"""LoRA: a trained low-rank change beside frozen weights.

W x becomes W x + (alpha / rank) B A x, with A in R^(rank x in) drawn at random and B in
R^(out x rank) zero, so that the model is unchanged at step 0. Hu et al. 2021, "LoRA: Low-Rank
Adaptation of Large Language Models", section 4.1.

Attention projections q and v are the targets of the paper (section 4.2, and 7.1 for why);
`all-linear` also adapts the FFN, which QLoRA (Dettmers et al. 2023, section 4) found necessary
to match full fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from tuneline.errors import MergeError, MethodError, did_you_mean
from tuneline.finetune.methods.method import MergeTensor, Method
from tuneline.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_PUBLISHED_TARGETS = ("q_proj", "v_proj")


class LoraSettings(Settings):
    """Hyperparameters of LoRA."""

    name: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=1024)
    """Rank of the change; trainable parameters grow with it linearly."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of zeroing an input element of the low-rank branch while training."""
    target_modules: tuple[str, ...] = Field(default=_PUBLISHED_TARGETS, min_length=1)
    """Names of the linear modules to adapt, or ["all-linear"] for each one but the output layer."""
    layers: tuple[int, ...] = ()
    """[first, end) of the blocks to adapt, all when empty. Blocks below the first keep no
    autograd graph: adapting the upper half saves about a quarter of a step's time."""

    @field_validator("layers")
    @classmethod
    def _range(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (0, 2):
            raise ValueError("must be [first, end) or empty")
        return value


def linear_module_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of the model's linear modules, output layer aside, in the model's order."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not output:
            names[name.rsplit(".", 1)[-1]] = None
    return list(names)


def _is_transposed(model: PreTrainedModel, targets: list[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in targets
    )


def _check_layers(layers: tuple[int, ...], model: PreTrainedModel) -> list[int]:
    first, end = layers
    count = int(model.config.num_hidden_layers)
    if not 0 <= first < end <= count:
        raise MethodError(
            f"lora: layers [{first}, {end}] is no range of the model's {count} blocks: "
            f"give [first, end) with 0 <= first < end <= {count}"
        )
    return list(range(first, end))


def attach(model: PreTrainedModel, config: Settings) -> PeftModel:
    """Freeze the base and add LoRA branches.

    Raises:
        MethodError: a target names no linear module, or `layers` is out of range.
    """
    from peft import LoraConfig, get_peft_model

    assert isinstance(config, LoraSettings)
    linear = linear_module_names(model)
    targets = linear if config.target_modules == (ALL_LINEAR,) else list(config.target_modules)
    unknown = [name for name in targets if name not in linear]
    if unknown:
        raise MethodError(
            f"lora: target_modules {unknown} match no linear module of {type(model).__name__}; "
            f"linear modules are {', '.join(linear)}, or use [{ALL_LINEAR}]."
            f"{did_you_mean(unknown[0], [*linear, ALL_LINEAR])}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # floats work
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=_is_transposed(model, targets),
            layers_to_transform=_check_layers(config.layers, model) if config.layers else None,
        ),
    )


_MERGED_AS_PLAIN: Mapping[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "trainable_token_indices": None,
    "lora_bias": False,
}
"""adapter_config.json keys whose other values need more than W + scale B A."""


def open_merge(adapter_dir: str) -> tuple[MergeTensor, frozenset[str]]:
    """The merge function W + (alpha / rank) B A of an adapter folder, computed in fp32.

    Raises:
        MergeError: the adapter has parts beyond plain LoRA on linear modules.
    """
    from safetensors.torch import load_file

    folder = Path(adapter_dir)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key, plain in _MERGED_AS_PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise MergeError(
                f"{adapter_dir}: {key}={config[key]!r} can't be merged tensor by tensor; "
                f"this merge handles {key}={plain!r}"
            )
    rank, alpha = config["r"], config["lora_alpha"]
    transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps weights as (in, out)
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    weights = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    targets: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key in weights:
        if key.endswith(suffix):
            module = key.removeprefix(prefix).removesuffix(suffix)
            up = weights[key.replace(".lora_A.", ".lora_B.")]
            targets[f"{module}.weight"] = (weights[key], up)
    if 2 * len(targets) != len(weights):
        strange = sorted(k for k in weights if ".lora_A." not in k and ".lora_B." not in k)
        raise MergeError(f"{adapter_dir}: tensors {strange[:3]} are not LoRA's A or B")

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in targets:
            return tensor
        down, up = targets[name]
        change = scale * (up.float() @ down.float())
        if transposed:
            change = change.T
        if tensor.shape != change.shape:
            raise MergeError(
                f"{name}: base shape {tuple(tensor.shape)} is not the adapter's "
                f"{tuple(change.shape)}: the adapter belongs to another base"
            )
        return (tensor.float() + change).to(tensor.dtype)

    return merge, frozenset(targets)


METHOD = Method(
    name="lora",
    title="LoRA: low-rank change of linear layers",
    config_class=LoraSettings,
    attach=attach,
    open_merge=open_merge,
)
