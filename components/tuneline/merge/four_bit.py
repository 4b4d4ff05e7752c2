"""NF4 as loading does it: which weights are quantized, and to what.

The 4-bit model of training and evaluation is made by transformers and bitsandbytes while loading.
Here the same is done to one tensor at a time, by the same functions in the same order: the weight
in the compute dtype, Conv1D's turned around, quantized in blocks of 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.finetune import four_bits
from tuneline.finetune.load import bitsandbytes_config, compute_dtype, load_skeleton
from tuneline.finetune.methods.method import Quantization

if TYPE_CHECKING:
    import torch


def quantized_weights(
    path: Path, quantization: Quantization, *, trust_code: bool = False
) -> dict[str, bool]:
    """The weights that loading in 4 bits quantizes.

    Returns:
        Name of the weight in the model -> whether it is turned around (Conv1D) before.
    """
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoHfQuantizer

    model = load_skeleton(path, trust_code=trust_code)
    quantizer = AutoHfQuantizer.from_config(
        bitsandbytes_config(quantization, compute_dtype()), pre_quantized=False
    )
    quantizer.preprocess_model(model=model, device_map=None)
    return {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)  # pyright: ignore[reportArgumentType]
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def quantize(weight: torch.Tensor, quantization: Quantization) -> tuple[torch.Tensor, Any]:
    """Packed values and the state that undoes it, of a weight (outputs, inputs)."""
    return four_bits.functional().quantize_4bit(
        weight.to(compute_dtype()).contiguous(),
        blocksize=64,
        compress_statistics=quantization.double,
        quant_type="nf4",
    )


def dequantized(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """What a weight (outputs, inputs) is in the 4-bit model, fp32."""
    return four_bits.functional().dequantize_4bit(*quantize(weight, quantization)).float()


def quantized_tensors(
    name: str, weight: torch.Tensor, quantization: Quantization
) -> dict[str, torch.Tensor]:
    """The tensors that a 4-bit checkpoint keeps for one weight (outputs, inputs)."""
    packed, state = quantize(weight, quantization)
    return {name: packed} | {
        f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()
    }
