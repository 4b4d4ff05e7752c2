"""Rows to batches: by a budget of tokens, rows of like length together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tuneline.artifacts import Artifact
from tuneline.data_prep.prepare import Split, load_split
from tuneline.finetune.loss import IGNORE_INDEX

_GROUP_BATCHES = 8
"""Rows are sorted by length within about this many batches: enough that padding is a few percent,
few enough that a batch is still a random draw."""


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of row indices with at most `batch_tokens` tokens each, padding included.

    The rows are dealt out to batches once; each epoch visits the batches in its own order. A row
    longer than the budget is a batch of its own.

    Args:
        lengths: of the rows, in tokens.
        batch_tokens: most rows x longest row in a batch.
        seed: of the dealing and the orders; None keeps the rows in order (for evaluation).
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int | None) -> None:
        self._seed = seed
        self._epoch = 0
        order = list(range(len(lengths)))
        if seed is None:
            order.sort(key=lambda row: lengths[row])
            self._batches = list(_fill(order, lengths, batch_tokens))
            return
        random.Random(seed).shuffle(order)
        mean = sum(lengths) / len(lengths)
        group = max(1, round(_GROUP_BATCHES * batch_tokens / mean))
        self._batches = [
            batch
            for start in range(0, len(order), group)
            for batch in _fill(
                sorted(order[start : start + group], key=lambda row: lengths[row]),
                lengths,
                batch_tokens,
            )
        ]

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self._batches)
        if self._seed is not None:
            random.Random(self._seed + 1 + self._epoch).shuffle(batches)
        return iter(batches)


def _fill(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for row in rows:  # ascending length: the newest row is the longest
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right: `input_ids`, `attention_mask`, `labels`, each (B, T) int64."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids = torch.tensor(row["input_ids"])
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        supervised = torch.tensor(row["supervised"], dtype=torch.bool)
        labels[index, :length] = ids.masked_fill(~supervised, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches_of(
    dataset: Artifact, split: Split, *, batch_tokens: int, pad_token_id: int, seed: int | None
) -> DataLoader[dict[str, Tensor]]:
    """A loader over one split of a PreparedDataset; `seed` None is evaluation order."""
    rows = load_split(dataset, split)
    lengths = rows.data.column("input_ids").combine_chunks().value_lengths().to_pylist()
    return DataLoader(
        rows,
        batch_sampler=TokenBudgetSampler(lengths, batch_tokens, seed),
        collate_fn=lambda batch: collate(batch, pad_token_id),
    )
