"""From a chat to token ids with an exact mask of what is supervised.

The chat is rendered once by the tokenizer's own template and tokenized once, as a whole; the mask
comes from character offsets. Each assistant turn's text is what rendering up to and including the
turn adds to rendering up to it with the generation prompt. So the supervised tokens are exactly
what the model has to produce when it serves the same prompt, end-of-turn token included, and no
template needs generation markers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneline.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A chat as text, with the character spans [start, end) that are supervised."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokens:
    """A row ready to train on.

    Attributes:
        input_ids: T token ids.
        supervised: T values 0 or 1; 1 where the token has to be predicted. The first is 0: nothing
            comes before it to predict it from.
    """

    input_ids: list[int]
    supervised: list[int]


def load_tokenizer(path: str, *, trust_code: bool = False) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a chat template and an end-of-sequence token.

    Args:
        path: the model's folder.
        trust_code: run the folder's own Python code, whose pin was checked.

    Raises:
        ModelError: it can't be loaded.
        DataError: one of these is missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the tokenizer of {path} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    from tokenizers import processors

    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {path} gives no character offsets: tokenizer.json is needed"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {path} has no chat template: an instruct model is needed"
        )
    if tokenizer.eos_token is None:
        raise DataError(f"the tokenizer of {path} has no end-of-sequence token")
    # Some families (Llama 3) trim white space off the offsets, which would take the spaces out of
    # the mask. The post-processor is of no other use here: templates write the special tokens.
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def render_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The text that a server would give the model to answer `messages`."""
    return _apply(tokenizer, messages, add_generation_prompt=True)


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Rendered:
    """Render a chat and find its assistant turns.

    Raises:
        DataError: the template raises, or it does not render a chat as a continuation of the
            prompt that precedes the answer (what training sees would not be what serving renders).
    """
    text = _apply(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        through = text if index + 1 == len(messages) else _apply(tokenizer, messages[: index + 1])
        if not (through.startswith(prompt) and text.startswith(through)):
            raise DataError(
                "the chat template renders the answer differently in a conversation than after its "
                "prompt, so that training would not see what serving renders: message "
                f"{index + 1} of {len(messages)}"
            )
        # a line break that the template puts behind the end-of-turn token is not the model's to say
        spans.append((len(prompt), len(prompt) + len(through[len(prompt) :].rstrip())))
    if not any(text[:end].endswith(token) for _, end in spans[-1:] for token in _ends(tokenizer)):
        # a template that does not end the last turn leaves the model no way to learn to stop
        text = text[: spans[-1][1]] + tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return Rendered(text, tuple(spans))


def answer(tokenizer: Any, rendered: Rendered) -> str:
    """The text of the last answer as the model has to write it, without the end token.

    That can be more than the row's own content: some templates put an empty thinking block first.
    """
    start, end = rendered.spans[-1]
    text = rendered.text[start:end]
    for token in _ends(tokenizer):
        text = text.removesuffix(token)
    return text


def tokenize(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Tokens]:
    """Tokenize a batch of rendered chats; a token that overlaps a supervised span is supervised."""
    batch = tokenizer(
        [r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True
    )
    return [
        Tokens(ids, _mask(offsets, chat.spans))
        for ids, offsets, chat in zip(
            batch["input_ids"], batch["offset_mapping"], rendered, strict=True
        )
    ]


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    mask = [0] * len(offsets)
    span = 0
    for position, (start, end) in enumerate(offsets):
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        if span == len(spans):
            break
        mask[position] = int(position > 0 and end > spans[span][0] and end > start)
    return mask


def _ends(tokenizer: Any) -> list[str]:
    # any special token ends a turn: <|im_end|>, <|eot_id|>, </s>, <end_of_turn>, ...
    return [tokenizer.eos_token, *tokenizer.all_special_tokens]


def _apply(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except TemplateError as error:
        raise DataError(f"the chat template refuses the chat: {error}") from error
