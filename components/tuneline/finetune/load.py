"""Models in memory: a base in 32, 16 or 4 bits, and what was tuned on it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import ModelError
from tuneline.finetune import four_bits
from tuneline.finetune.methods.method import Quantization
from tuneline.recipe import method_of, method_settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


_LARGEST_4_BIT_ERROR: Final = 0.13


def load_base(
    path: Path,
    *,
    trust_code: bool = False,
    quantization: Quantization | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal LM on the first accelerator, else on CPU.

    Args:
        path: a folder with configuration and safetensors weights.
        trust_code: run the folder's own Python code, which `base_model.resolve` has checked
            against its pinned digest.
        quantization: load the linear layers in 4 bits.
        dtype: of the weights, or of the arithmetic where they are in 4 bits; None: fp32 on CPU, on
            an accelerator the files' own, or bf16 for arithmetic.

    Raises:
        ModelError: configuration or weights can't be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    accelerated = torch.cuda.is_available()
    device = torch.device("cuda" if accelerated else "cpu")
    options: dict[str, Any] = {}
    if quantization is not None:
        dtype = dtype or compute_dtype()
        options = {
            "quantization_config": bitsandbytes_config(quantization, dtype),
            "device_map": {"": device},
        }
    elif dtype is None and not accelerated:
        dtype = torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype is not None else "auto",
            use_safetensors=True,
            trust_remote_code=trust_code,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{path} can't be loaded as a causal language model: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}"
        ) from error
    keep_4_bit_weights(model)  # also of a folder that is in 4 bits itself
    if wrong := wrong_4_bit_widths(model):
        raise ModelError(
            f"bitsandbytes {version('bitsandbytes')} computes wrongly in 4 bits on this machine "
            f"with layers of {wrong} inputs: take a model and a method without 4 bits, or another "
            "machine"
        )
    if quantization is not None:
        return model
    return model.to(device)  # pyright: ignore[reportArgumentType]


def keep_4_bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for inference.

    On a CPU with AVX-512 BF16 it does that at the first forward pass in evaluation mode, and for
    good: scales are rounded to bf16, and no gradient passes through the layer any more, without an
    error. A validation amid training would end the learning, and a merge would meet other weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # not of every module


def wrong_4_bit_widths(model: nn.Module) -> list[int]:
    """Numbers of inputs of 4-bit layers that bitsandbytes gets wrong on this machine.

    Each width is tried: NF4 is 0.09 off, of a random weight's size.
    """
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    widths = {state.shape[-1] for state in states if state is not None}
    if not widths:
        return []
    import torch

    bits = four_bits.functional()
    device = next(model.parameters()).device
    wrong = []
    for width in sorted(widths):
        random = torch.Generator().manual_seed(width)
        weight = torch.randn(16, width, generator=random).to(device)
        plain = bits.dequantize_4bit(*bits.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        if float((plain - weight).norm() / weight.norm()) > _LARGEST_4_BIT_ERROR:
            wrong.append(width)
    return wrong


def load_skeleton(path: Path, *, trust_code: bool = False) -> PreTrainedModel:
    """The model without its weights, in fp32 on CPU: parameters are zeros that take no memory.

    Each is one zero that is read again for every element. Unlike parameters on the meta device,
    they can be given to what asks for a device or computes a little with them.

    Raises:
        ModelError: the configuration can't be loaded.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_code)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_code
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is no causal language model: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}"
        ) from error
    model.tie_weights()
    zeros: dict[int, torch.nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = torch.zeros(()).expand(parameter.shape)
            held = zeros.setdefault(id(parameter), torch.nn.Parameter(zero, requires_grad=False))
            module.register_parameter(name, held)
    return model.eval()


def compute_dtype() -> torch.dtype:
    """bf16 on accelerators that have it; else fp32, since CPUs without bf16 units lose by it, and
    GPUs before Ampere, which compute it in fp32 and round."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The 4-bit setting in transformers' words."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )


def stands_on_base(adapter: Artifact) -> bool:
    """Whether the tuned model is the base in 32 or 16 bits with something on it."""
    settings = method_settings(adapter.manifest.config["method"])
    return method_of(settings).stored_as == "adapter" and settings.quantization is None


def load_tuned(
    base: BaseModel, adapter: Artifact, loaded_base: PreTrainedModel | None = None
) -> PeftModel | PreTrainedModel:
    """The tuned model as it was trained: on a 4-bit base where the method used one.

    Args:
        base: what the adapter was trained on.
        adapter: of kind `adapter`.
        loaded_base: the base if it is in memory already and `stands_on_base`; it is changed.

    Raises:
        ModelError: the weights can't be loaded.
    """
    settings = method_settings(adapter.manifest.config["method"])
    method = method_of(settings)
    if method.stored_as == "model":
        return load_base(adapter.path, trust_code=base.trusts_code)
    if loaded_base is None:
        loaded_base = load_base(
            base.path, trust_code=base.trusts_code, quantization=settings.quantization
        )
    return method.load(loaded_base, str(adapter.path))


def parameter_count(model: nn.Module) -> int:
    """Number of weights, of a 4-bit tensor those that it stands for (it packs two in a byte)."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return total
