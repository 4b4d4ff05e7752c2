"""Answers to prompts: batched, greedy, left-padded, KV-cached, ending at an end token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_batch: Callable[[int, int, float], None],
) -> list[str]:
    """Greedy answers in the order of the prompts.

    Prompts of like length go together, so that little is padded.

    Args:
        model: a causal LM, wrapped by PEFT or not; it is put into evaluation mode.
        tokenizer: of the model.
        prompts: rendered by the chat template, special tokens included.
        batch_size: prompts at once.
        max_new_tokens: longest answer.
        on_batch: told how many of how many prompts are done, after how many seconds.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
    pad: Any = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    answers = [""] * len(prompts)
    started = time.monotonic()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(encoded[rows[-1]])
        input_ids = torch.full((len(rows), width), pad)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            ids = torch.tensor(encoded[row])
            input_ids[index, width - len(ids) :] = ids
            attention_mask[index, width - len(ids) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=_end_tokens(model, tokenizer),
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
        on_batch(min(start + batch_size, len(order)), len(order), time.monotonic() - started)
    return answers


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({*(e for e in ends if e is not None), tokenizer.eos_token_id})
