"""Cross-entropy at supervised positions only, in memory that the vocabulary does not decide.

A causal LM of transformers computes logits, V values, at every one of B x T positions, and the
loss then ignores most of them. Here the hidden states of the N supervised positions are picked in
front of the output layer. It is exact: no position's logits depend on another's output layer.

Where the output layer is a plain linear one and the model does nothing to its logits, the loss
goes on in chunks of positions: logits, softmax and the gradient of the hidden states of a chunk,
then the next. At most `_CHUNK_BYTES` of logits exist at any time, none are kept for the backward
pass, and nothing is computed twice. The gradient is that of cross-entropy,
dL/dlogits = softmax(logits) - onehot(target), times the layer's weight. Models that scale or cap
their logits (Gemma 2, Cohere, Granite) and adapted output layers keep the N x V logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tuneline.errors import ModelError
from tuneline.finetune.methods.structure import output_layer

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX: Final = -100
_CHUNK_BYTES: Final = 32 * 2**20
"""Of fp32 logits at once: some hundred positions of a usual vocabulary, enough for full speed."""
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")


def supervised_nll(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the supervised tokens.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        batch: `input_ids`, `labels` and `attention_mask` or `position_ids`, each (B, T) integers;
            labels are not shifted and IGNORE_INDEX where not supervised.

    Returns:
        The sum in nats as a scalar that carries gradients, and N, the number of tokens in it.
    """
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    selected = targets != IGNORE_INDEX
    targets = targets[selected]
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    layer = output_layer(plain)
    chunked = _logits_are_the_layers(plain, layer, inputs)
    hooks = _hooks_of(layer, compiled=is_compiled_module(model))
    with hooks.computing(selected, targets if chunked else None):
        output = model(**inputs, use_cache=False).logits
    if chunked:
        return output.view(()), selected.sum()
    return functional.cross_entropy(output[0].float(), targets, reduction="sum"), selected.sum()


class _Hooks:
    """What an output layer does while a loss is computed; at other times it is as it was.

    They stay on the layer: a compiled model is compiled anew when the hooks in it change.
    """

    def __init__(self, layer: nn.Module, *, hidden: bool) -> None:
        self.hidden = hidden
        self._selected: Tensor | None = None
        self._targets: Tensor | None = None
        self._picked: Tensor | None = None
        before: Any = self._before
        after: Any = self._after
        if hidden:  # the compiler leaves them alone and compiles what is in front of them
            before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        self._handles = (
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(after),
        )

    @contextmanager
    def computing(self, selected: Tensor, targets: Tensor | None) -> Iterator[None]:
        """Let the layer see the selected positions, or return their loss where there are targets.

        Args:
            selected: (B, T), booleans.
            targets: (N,) of the selected positions, or None for their logits.
        """
        self._selected, self._targets = selected, targets
        try:
            yield
        finally:
            self._selected = self._targets = self._picked = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._selected is None:
            return None
        hidden, *rest = arguments
        picked = _pick(hidden, self._selected)
        if self._targets is None:
            return (picked.unsqueeze(0), *rest)
        self._picked = picked
        return (hidden[:, :0], *rest)

    def _after(self, linear: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del output
        if self._picked is None:
            return None
        # in place of the logits: the loss leaves through every wrapper of the model that way, and
        # a divided weight is whole here
        return _ChunkedNll.apply(self._picked, linear.weight, linear.bias, self._targets)


_HOOKS: weakref.WeakKeyDictionary[nn.Module, _Hooks] = weakref.WeakKeyDictionary()


def _hooks_of(layer: nn.Module, *, compiled: bool) -> _Hooks:
    hooks = _HOOKS.get(layer)
    if hooks is None or (compiled and not hooks.hidden):
        if hooks is not None:
            hooks.remove()
        hooks = _HOOKS[layer] = _Hooks(layer, hidden=compiled)
    return hooks


def _pick(hidden: Tensor, selected: Tensor) -> Tensor:
    if hidden.shape[0] != selected.shape[0] or hidden.shape[1] < selected.shape[1]:
        raise ModelError(
            f"the output layer reads hidden states of shape {tuple(hidden.shape)} for a batch "
            f"of shape {tuple(selected.shape)}: (batch, positions, width) is needed"
        )
    # methods that put virtual tokens in front make hidden longer than the batch
    return hidden[:, hidden.shape[1] - selected.shape[1] :][selected]


class _ChunkedNll(torch.autograd.Function):
    """Summed cross-entropy of a linear layer's logits; gradients are made in the forward pass.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> (1, 1, 1), in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        total = torch.zeros((1, 1, 1), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        # a sum over chunks would lose what bf16 can't hold
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if of_bias else None
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk, target = hidden[part], targets[part].unsqueeze(1)
            logits = functional.linear(chunk, weight, bias).float()
            highest = logits.amax(1, keepdim=True)
            wanted = logits.gather(1, target)
            logits.sub_(highest).exp_()
            sums = logits.sum(1, keepdim=True)
            total += (sums.log() + highest - wanted).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            error = logits.div_(sums)
            error.scatter_add_(1, target, error.new_full((1, 1), -1.0).expand_as(target))
            if grad_bias is not None:
                grad_bias += error.sum(0)
            error = error.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = error @ weight
            if grad_weight is not None:
                grad_weight += error.T @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator has no types
        grad = grad_outputs[0].view(())
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if of_hidden is None else of_hidden * grad.to(of_hidden.dtype),
            None if of_weight is None else (of_weight * grad).to(weight_dtype),
            None if of_bias is None else (of_bias * grad).to(bias_dtype),
            None,
        )


_PLAIN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _logits_are_the_layers(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model returns what its output layer computes, seen once on two tokens."""
    if type(layer) is not nn.Linear:
        return False
    if layer not in _PLAIN:
        outputs: list[Tensor] = []
        few = {name: values[:1, :2] for name, values in inputs.items()}

        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        # the random numbers of training stay where they are
        with layer.register_forward_hook(keep), torch.no_grad(), torch.random.fork_rng():
            logits = model(**few, use_cache=False).logits
        _PLAIN[layer] = len(outputs) == 1 and torch.equal(logits, outputs[0])
    return _PLAIN[layer]


def held_out_nll(model: nn.Module, batches: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of supervised tokens, of all batches.

    Dropout is off; the model's mode afterwards is as before.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        # sharded weights that were first gathered in inference mode could not train
        with torch.no_grad():
            for batch in batches:
                nll, tokens = supervised_nll(model, {k: v.to(device) for k, v in batch.items()})
                total += float(nll)
                count += int(tokens)
    finally:
        model.train(was_training)
    return total, count
