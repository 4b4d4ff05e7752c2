"""Answers to prompts: batched, greedy, left-padded, KV-cached, ending at an end token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tuneline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """One answer."""

    text: str
    """Without its end token and special ones."""
    ended: bool
    """Whether the model ended it; else it was cut at the limit."""
    prompt_cut: bool = False
    """Whether its prompt lost its start, since the model's context had no room for all of it."""


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    on_batch: Callable[[int, int], None],
    read: Callable[[Sequence[int]], str] | None = None,
    cut_prompts: bool = False,
) -> list[Generated]:
    """Greedy answers in the order of the prompts.

    Prompts of like length go together, the longest first: little is padded, and a batch that does
    not fit into memory fails at once and not after an hour. Behind virtual tokens (prompt tuning)
    only prompts of equal length do: padding would come between the two, which no training row had.

    Args:
        model: a causal LM, wrapped by PEFT or not; it is put into evaluation mode.
        tokenizer: of the model.
        prompts: rendered by the chat template, special tokens included.
        batch_size: most prompts at once.
        batch_tokens: most tokens at once, prompts, padding and answers; a prompt that needs more
            is a batch of its own.
        max_new_tokens: longest answer.
        on_batch: told how many of how many prompts are done.
        read: makes the text of an answer's token ids; None: the tokenizer, special tokens left out.
        cut_prompts: take the start off a prompt that leaves no room, as `fitted` does.

    Raises:
        DataError: a prompt leaves no room for an answer in the model's context.
    """
    import torch

    if read is None:
        read = partial(tokenizer.decode, skip_special_tokens=True)

    model.eval()
    device = next(model.parameters()).device
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    context = getattr(model.config, "max_position_embeddings", None)
    virtual = virtual_tokens(model)
    if context is not None:
        context -= virtual
    whole = [len(ids) for ids in encoded]
    if cut_prompts:
        encoded = [fitted(ids, context, max_new_tokens, tokenizer.bos_token_id) for ids in encoded]
    lengths = [len(ids) for ids in encoded]
    check_room(lengths, context)
    ends = end_tokens(model.generation_config, tokenizer)
    pad: Any = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    answers: list[Generated | None] = [None] * len(prompts)
    done = 0
    for rows in batches_by_tokens(
        lengths, batch_size, batch_tokens, max_new_tokens, padded=not virtual
    ):
        width = lengths[rows[0]]
        input_ids = torch.full((len(rows), width), pad)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            ids = torch.tensor(encoded[row], dtype=torch.long)
            input_ids[index, width - len(ids) :] = ids
            attention_mask[index, width - len(ids) :] = 1
        room = max_new_tokens if context is None else min(max_new_tokens, context - width)
        with torch.inference_mode(), warnings.catch_warnings():
            # peft's, of virtual tokens: without padding, positions need not be told
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        for row, ids in zip(rows, output[:, width:].tolist(), strict=True):
            kept = until_end(ids, ends)
            answers[row] = Generated(read(kept), len(kept) < len(ids), lengths[row] < whole[row])
        done += len(rows)
        on_batch(done, len(prompts))
    return [answer for answer in answers if answer is not None]


def virtual_tokens(model: Any) -> int:
    """How many vectors the active adapter puts in front of the input."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def batches_by_tokens(
    lengths: Sequence[int],
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    *,
    padded: bool = True,
) -> Iterator[list[int]]:
    """Positions of prompts, longest first, so that rows x (longest + answer) fits the budget.

    Without `padded`, prompts of one batch have one length.
    """
    batch: list[int] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (
            len(batch) == batch_size
            or (len(batch) + 1) * (width + max_new_tokens) > batch_tokens
            or not (padded or lengths[row] == width)
        ):
            yield batch
            batch = []
        if not batch:
            width = lengths[row]
        batch.append(row)
    if batch:
        yield batch


def check_room(lengths: Sequence[int], context: int | None) -> None:
    """Refuse prompts that fill the context, or more.

    Raises:
        DataError: names the longest.
    """
    if context is not None and max(lengths, default=0) >= context:
        raise DataError(
            f"a prompt of {max(lengths)} tokens leaves no room for an answer in the model's "
            f"context of {context}: lower data.max_seq_len"
        )


def fitted(
    ids: list[int], context: int | None, max_new_tokens: int, bos_id: int | None
) -> list[int]:
    """A prompt from which so much of the start is taken that an answer fits behind it.

    As `data.overflow: truncate_left` does, it keeps a first token that models need. An answer is
    given half of the context at most.
    """
    if context is None:
        return ids
    room = max(1, context - min(max_new_tokens, context // 2))
    if len(ids) <= room:
        return ids
    if ids[0] == bos_id and room > 1:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def until_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """What was generated before the first end token; padding follows that."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids that an answer ends at: the model's own and the tokenizer's."""
    configured = generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({*(e for e in ends if e is not None), tokenizer.eos_token_id})
