"""Memory that does not suffice: about how much training needs, and what would fit.

Held throughout are the weights, and for each parameter that trains its gradient and AdamW's two
moments, all fp32. Beside that each token of a micro-batch holds what the backward pass reads: per
layer about six vectors of the hidden width (the norms' inputs, query, output, residual), key and
value, and four of the feed-forward width (Korthikanti et al. 2022, section 4.1, without dropout and
with attention that keeps no scores). Where micro-batches have gone through, what they took is
measured instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tuneline.errors import TrainingError
from tuneline.progress import peak_memory_bytes

_TRAINED_BYTES: Final = 12
"""Of a parameter that trains, beside its weight: a gradient and two moments."""
_LEAST_SHARE: Final = 0.75
"""Of the tokens that did not fit, at most: the figure is an estimate."""
_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def limit_bytes() -> int:
    """What this process can have: of its accelerator, else of its container or machine."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return machine


def peak_bytes() -> int:
    """The most that this process has held, of the accelerator's memory or else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


def static_bytes(model: nn.Module) -> int:
    """Of weights, gradients and optimizer."""
    return sum(
        _numel(parameter) * (parameter.element_size() + _TRAINED_BYTES * parameter.requires_grad)
        for parameter in model.parameters()
    )


def _numel(parameter: nn.Parameter) -> int:
    """Of this process: where parameters are divided, its part."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def token_bytes(config: Any, element_bytes: int, *, checkpointing: bool) -> int:
    """Of what a token of a micro-batch holds for the backward pass; 0 for a config without widths.

    Args:
        config: of the model.
        element_bytes: of a number in the computation.
        checkpointing: of layers' borders only, and of all in one layer at a time.
    """
    hidden, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not hidden or not layers:
        return 0
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = (getattr(config, "num_key_value_heads", None) or heads) / heads
    layer = round(6 * hidden + 2 * kept * hidden + 4 * wide) * element_bytes
    return layers * hidden * element_bytes + layer if checkpointing else layers * layer


@dataclass
class Measured:
    """What micro-batches that went through took."""

    tokens: int = 0
    """Of the largest, padding included."""
    peak: int = 0
    """Bytes when it had gone through."""
    start: int = 0
    """Bytes before the first one."""

    def note(self, tokens: int) -> None:
        """A micro-batch of so many went through."""
        if tokens >= self.tokens:
            self.tokens, self.peak = tokens, peak_bytes()


def sentence(
    where: str,
    model: nn.Module,
    *,
    tokens: int,
    longest_row: int,
    element_bytes: int,
    checkpointing: bool,
    measured: Measured,
    limit: int,
) -> str:
    """What was too much, about how much there is room for, and what to do.

    Args:
        where: in the run.
        model: that trains.
        tokens: of the micro-batch that did not fit, padding included.
        longest_row: in it, in tokens.
        element_bytes: of a number in the computation.
        checkpointing: whether activations are computed again.
        measured: of the micro-batches before.
        limit: bytes that there are.
    """
    static = static_bytes(model)
    each = token_bytes(getattr(model, "config", None), element_bytes, checkpointing=checkpointing)
    trained = static - sum(_numel(p) * p.element_size() for p in model.parameters())
    taken = measured.peak - measured.start - trained
    if measured.tokens and taken > 0:
        each = taken // measured.tokens
    known = (
        f"out of memory {where} with micro-batches of up to {tokens} tokens: weights, gradients "
        f"and optimizer take about {static / 1e9:.1f} GB"
    )
    if each:
        known += f", a token about {each / 1e6:.2g} MB"
    known += f", and there are {limit / 1e9:.1f} GB: "
    again = "" if checkpointing else ", or set training.gradient_checkpointing: true"
    if static >= limit:
        return f"{known}no micro-batch fits: take a method that trains less, or more memory"
    fits = min(int((limit - static) / each), int(_LEAST_SHARE * tokens)) if each else 0
    figure = f" to about {fits}" if fits else ""
    if fits and longest_row > fits:
        return (
            f"{known}a row of {longest_row} tokens alone is too much: lower data.max_seq_len"
            f"{figure} and prepare the data again{again}"
        )
    return (
        f"{known}lower training.batch_tokens{figure} and raise "
        f"training.gradient_accumulation_steps by the same factor (the result stays){again}"
    )


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Of the base model in this folder.

    Raises:
        TrainingError: it does not fit.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        raise TrainingError(
            f"out of memory while the base model is loaded: its weights take {size / 1e9:.1f} GB "
            f"on disk, and there are {limit_bytes() / 1e9:.1f} GB: take a method with a quantized "
            "base (qlora), a smaller base model, or more memory"
        ) from error
