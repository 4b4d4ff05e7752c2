"""Several adapters' changes as one.

The changes are combined as whole matrices, s B A of each adapter, not their factors: the sum of
products is not the product of sums, and TIES and DARE are defined on changes of weights (Yadav et
al. 2023, "TIES-Merging", section 3; Yu et al. 2023, "Language Models are Super Mario", section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tuneline.errors import MergeError
from tuneline.finetune.methods.method import TensorChange
from tuneline.recipe import ExportSection

if TYPE_CHECKING:
    import torch


def combine(
    adapters: Sequence[Mapping[str, TensorChange]], export: ExportSection
) -> dict[str, TensorChange]:
    """One change per tensor that any of the adapters touches.

    Raises:
        MergeError: a change is not a sum, or the number of weights differs from that of adapters.
    """
    weights = export.weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise MergeError(
            f"export.weights has {len(weights)} factors for {len(adapters)} adapters: give one each"
        )
    names = list(dict.fromkeys(name for changes in adapters for name in changes))
    combined: dict[str, TensorChange] = {}
    for name in names:
        parts = [
            (changes[name], weight)
            for changes, weight in zip(adapters, weights, strict=True)
            if name in changes
        ]
        if len(adapters) == 1 and weights == (1.0,):
            combined[name] = parts[0][0]
            continue
        if any(change.delta is None for change, _ in parts):
            raise MergeError(
                f"{name}: a change that rescales or replaces weights (DoRA, IA3, modules_to_save) "
                "can't be combined by factors: merge such an adapter alone, with factor 1"
            )
        if len({change.shape for change, _ in parts}) > 1:
            raise MergeError(f"{name}: the adapters change different shapes")
        combined[name] = _combined(name, parts, export)
    return combined


def _combined(
    name: str, parts: Sequence[tuple[TensorChange, float]], export: ExportSection
) -> TensorChange:
    def delta() -> torch.Tensor:
        return _delta(name, parts, export)

    return TensorChange(
        shape=parts[0][0].shape,
        apply=lambda rows, first: rows.add_(delta()[first : first + len(rows)]),
        by_rows=False,
        delta=delta,
    )


def _delta(
    name: str, parts: Sequence[tuple[TensorChange, float]], export: ExportSection
) -> torch.Tensor:
    import torch
    from peft.utils.merge_utils import dare_linear, dare_ties, ties

    deltas = [change.delta() for change, _ in parts if change.delta is not None]
    weights = torch.tensor([weight for _, weight in parts])
    if export.combine == "linear":
        total = deltas[0].mul(weights[0])
        for other, weight in zip(deltas[1:], weights[1:], strict=True):
            total.add_(other, alpha=float(weight))
        return total
    if export.combine == "ties":
        return ties(deltas, weights, export.density)
    dare = dare_linear if export.combine == "dare_linear" else dare_ties
    with torch.random.fork_rng(devices=[]):
        # DARE draws what it drops: the same for a tensor whenever and wherever it is merged
        digest = hashlib.sha256(name.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "little"))
        return dare(deltas, weights, export.density)
