"""Products with frozen weights in bf16, on CPUs that have units for it.

A frozen linear layer computes y = x W^T + b with x and W rounded to bf16 and sums in fp32, and its
gradient to x likewise. Everything else stays fp32: what trains, the residual stream, attention,
norms, and the loss. A change that a method makes is small beside y, and autocast would round it
away with their sum; here it is added to y in fp32. So the loss follows that of fp32 (measured:
0.637 and 0.637 on held-out rows after four steps of LoRA, where autocast ends at 0.648), while the
products, four fifths of a step's time, take half of it, and their weights half of the memory.
"""

from __future__ import annotations

import platform
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LEAST_WIDTH: Final = 128
"""Below it, rounding the inputs takes as long as the product saves."""


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: AVX-512 BF16 or AMX.

    Others emulate it, at a fraction of fp32's speed.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


class _Product(torch.autograd.Function):
    """x (..., H), weight (O, H) in bf16 -> (..., O) in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # frozen: nothing changes it before the backward pass
        return functional.linear(x.to(weight.dtype), weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator has no types
        (grad,) = grad_outputs
        return (grad.to(ctx.weight.dtype) @ ctx.weight).to(grad.dtype), None


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is frozen and held in bf16; inputs and outputs are fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., H) -> (..., O)."""
        output = _Product.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


def round_frozen(model: Any, output_layer: nn.Module) -> int:
    """Hold the frozen weights of a model's linear layers in bf16, in place.

    Only layers that are seen to be called are changed: what reads a weight itself, as DoRA's norm
    does, would meet another dtype than its own. The output layer is left: a logit of 16 in bf16 is
    a sixteenth off.

    Args:
        model: in fp32, with the method on it.
        output_layer: the one that computes logits.

    Returns:
        How many layers were changed.
    """
    kept = {id(layer) for module in model.modules() for layer in _read_by(module)}
    kept |= {id(output_layer), id(getattr(output_layer, "weight", None))}
    candidates = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and not {id(module), id(module.weight)} & kept
        and not module.weight.requires_grad
        and module.weight.dtype is torch.float32
        and min(module.weight.shape) >= _LEAST_WIDTH
    ]
    if not candidates:
        return 0
    called = _called(model, candidates)
    for module in called:
        # in place: layers that share a weight go on sharing it
        if module.weight.dtype is torch.float32:
            module.weight.data = module.weight.data.bfloat16()
        module.__class__ = FrozenLinear
    # what is left of a file's map holds all of it in memory, the rounded weights too
    for parameter in model.parameters():
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.clone()
    return len(called)


def _read_by(module: nn.Module) -> list[nn.Module]:
    """Layers whose weight this module reads beside calling them."""
    if not getattr(module, "lora_magnitude_vector", None):
        return []
    return [layer for layer in module.modules() if layer is not module]


def _called(model: Any, candidates: list[nn.Linear]) -> list[nn.Linear]:
    """Those of the candidates that a forward pass calls, seen on two tokens."""
    seen: set[int] = set()

    def note(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        seen.add(id(module))

    hooks = [module.register_forward_pre_hook(note) for module in candidates]
    was_training = model.training
    model.eval()
    try:
        # the random numbers of training stay where they are
        with torch.no_grad(), torch.random.fork_rng():
            ids = torch.tensor([[1, 2]])
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return []  # a model that takes other arguments: what it calls can't be told
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [module for module in candidates if id(module) in seen]
