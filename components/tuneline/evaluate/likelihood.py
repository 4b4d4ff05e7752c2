"""How probable a model finds given tokens, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tuneline.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

Tokens = tuple[Sequence[int], Sequence[int]]
"""Token ids, and for each whether it is to be predicted (1) or only read (0)."""


def negative_log_likelihoods(
    model: nn.Module, rows: Sequence[Tokens], *, what: str, on_row: Callable[[int, int], None]
) -> list[float]:
    """Summed negative log-likelihood of each row's supervised tokens, in nats.

    One row at a time: nothing is padded, a row's figure doesn't depend on its neighbours, and the
    longest row alone decides the memory. Against generating its answer a row costs little.

    Args:
        model: a causal LM, wrapped by PEFT or not; it is put into evaluation mode.
        rows: at least one supervised token behind the first in each.
        what: names model and rows for errors.
        on_row: told how many of how many rows are done.

    Raises:
        ModelError: a likelihood is not finite.
    """
    import torch

    from tuneline.finetune.batching import collate
    from tuneline.finetune.loss import supervised_nll

    model.eval()
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for number, (input_ids, supervised) in enumerate(rows):
            row = {"row": number, "input_ids": input_ids, "supervised": supervised}
            batch = {key: value.to(device) for key, value in collate([row], 0).items()}
            nll = float(supervised_nll(model, batch)[0])
            if not math.isfinite(nll):
                raise ModelError(
                    f"{what}: the loss of row {number} is {nll}: the model's weights or its "
                    "precision are broken; lower training.learning_rate"
                )
            found.append(nll)
            on_row(number + 1, len(rows))
    return found


def predicted_tokens(supervised: Sequence[int]) -> int:
    """How many tokens a row's likelihood is over; nothing comes before the first to predict it."""
    return sum(supervised[1:])
