"""Rows to batches: by a budget of tokens, rows of like length together or packed end to end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tuneline.artifacts import Artifact
from tuneline.data_prep.prepare import Split, load_split
from tuneline.finetune.loss import IGNORE_INDEX

Layout = Literal["grouped", "packed"]
"""`grouped`: (B, T), rows of like length, padded on the right. `packed`: (1, T), rows end to end,
each with positions of its own and, through them, attention of its own."""

_GROUP_BATCHES = 8
"""Rows are sorted by length within about this many batches: enough that padding is a few percent,
few enough that a batch is still a random draw."""


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of row indices with at most `batch_tokens` tokens each, padding included.

    The rows are dealt out to batches once; each epoch visits the batches in its own order. A row
    longer than the budget is a batch of its own. Every rank gets the same number of batches; where
    they don't come out even, the last one of a rank is another rank's with each row's index i
    replaced by ~i, for rows that are computed and not learned from.

    Args:
        lengths: of the rows, in tokens.
        batch_tokens: most rows x longest row in a batch, or most tokens in a packed one.
        seed: of the dealing and the orders; None keeps the rows in order (for evaluation).
        layout: how a batch will be laid out.
        rank: of this process.
        world_size: how many processes share the rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_tokens: int,
        seed: int | None,
        layout: Layout = "grouped",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._seed = seed
        self._epoch = 0
        self._rank = rank
        self._world_size = world_size
        deal = _fill if layout == "grouped" else _pack
        order = list(range(len(lengths)))
        if seed is None:
            order.sort(key=lambda row: lengths[row])
            self._batches = list(deal(order, lengths, batch_tokens))
            return
        random.Random(seed).shuffle(order)
        mean = sum(lengths) / len(lengths)
        group = max(1, round(_GROUP_BATCHES * batch_tokens / mean))
        self._batches = [
            batch
            for start in range(0, len(order), group)
            for batch in deal(
                sorted(order[start : start + group], key=lambda row: lengths[row]),
                lengths,
                batch_tokens,
            )
        ]

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._batches) // self._world_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self._batches)
        if self._seed is not None:
            random.Random(self._seed + 1 + self._epoch).shuffle(batches)
        missing = -len(batches) % self._world_size
        # batches of the same step differ least in length, so that ranks wait least
        batches += [[~row for row in batch] for batch in batches[-missing:] * missing][:missing]
        return iter(batches[self._rank :: self._world_size])


def _fill(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for row in rows:  # ascending length: the newest row is the longest
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pack(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """First fit, longest row first."""
    batches: list[list[int]] = []
    room: list[int] = []
    for row in reversed(rows):  # they come by ascending length
        for index, left in enumerate(room):
            if lengths[row] <= left:
                batches[index].append(row)
                room[index] -= lengths[row]
                break
        else:
            batches.append([row])
            room.append(batch_tokens - lengths[row])
    yield from batches


def _labels(row: dict[str, Any], ids: Tensor) -> Tensor:
    if row["row"] < 0:
        return torch.full_like(ids, IGNORE_INDEX)
    supervised = torch.tensor(row["supervised"], dtype=torch.bool)
    supervised[0] = False  # nothing in front of it may predict it
    return ids.masked_fill(~supervised, IGNORE_INDEX)


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels`, each (B, T) int64, and `rows` (B,): where in the
        split each one is. A row's first label is ignored: nothing in front of it may predict it.
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids = torch.tensor(row["input_ids"])
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        labels[index, :length] = _labels(row, ids)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "rows": torch.tensor([row["row"] for row in rows]),
    }


def pack(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Put rows end to end.

    There is no attention mask: where positions start again, transformers cuts the attention, as a
    block-diagonal mask or, for flash attention, as sequence lengths.

    Returns:
        `input_ids`, `position_ids`, `labels`, each (1, T) int64, and `rows` (B,). A row's first
        label is ignored.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [_labels(row, tokens) for row, tokens in zip(rows, ids, strict=True)]
    return {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(tokens)) for tokens in ids]).unsqueeze(0),
        "labels": torch.cat(labels).unsqueeze(0),
        "rows": torch.tensor([row["row"] for row in rows]),
    }


class _Rows(Dataset[dict[str, Any]]):
    """One split; each row carries its index, and index ~i is row i without supervision."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": index, **self._split[index if index >= 0 else ~index]}


def batches_of(
    dataset: Artifact,
    split: Split,
    *,
    batch_tokens: int,
    pad_token_id: int,
    seed: int | None,
    layout: Layout = "grouped",
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[dict[str, Tensor]]:
    """A loader over one split of a PreparedDataset; `seed` None is evaluation order."""
    rows = load_split(dataset, split)
    # chunk by chunk: a column of more than 2^31 tokens can't be one
    lengths = [
        length
        for chunk in rows.data.column("input_ids").chunks
        for length in chunk.value_lengths().to_pylist()
    ]
    return DataLoader(
        _Rows(rows),
        batch_sampler=TokenBudgetSampler(lengths, batch_tokens, seed, layout, rank, world_size),
        collate_fn=pack if layout == "packed" else partial(collate, pad_token_id=pad_token_id),
        # a loader draws a seed for its workers each time it starts; from a generator of its own,
        # that does not move the random numbers of dropout
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
