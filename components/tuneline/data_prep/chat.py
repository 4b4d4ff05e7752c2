"""From a chat to token ids with an exact mask of what is supervised.

A chat is rendered by the tokenizer's own template, through the very function that
`apply_chat_template` renders with. Each assistant turn's span is what rendering up to and including
the turn adds to rendering up to it with the generation prompt: what the model has to write when it
serves that prompt, end-of-turn token included. No template needs generation markers.

Two things could still make training see other tokens than serving, and both are handled per row:

- A template may render an earlier turn differently once the conversation goes on (Qwen3 drops its
  thinking). Turns whose rendering the later text no longer holds get a row of their own, which is
  exactly the conversation as it was served at that turn.
- A tokenizer may merge the end of the prompt with the start of the answer. The prompt and the
  answer of a row are therefore encoded apart, as serving does; where an earlier turn of the same
  row has such a border, each turn gets its own row.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tuneline.data_prep.records import BadRow, Message, Record, as_json
from tuneline.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Literal["assistant", "last", "all"]
Overflow = Literal["drop", "truncate_left", "truncate_right", "split"]

FALLBACK_TEMPLATES: Final = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + EOS + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize + ': ' "
        "+ message['content'] }}{% if message['role'] == 'assistant' %}{{ EOS }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
_WORDS_REMEMBERED: Final = 100_000
_SHARING: Final = 8
"""So many prompts at least are looked at for a start that they share."""
_THINKING: Final = re.compile(r"</?(?:\w+:)?think(?:ing)?>")
_STUMBLES: Final = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True)
class ChatFormat:
    """All that turns chats into tokens, as plain values that another process can take.

    Attributes:
        tokenizer: of the `tokenizers` library, as JSON.
        template: the chat template.
        template_name: `tokenizer`, or the name of the fallback.
        special_tokens: what the template may name, such as `eos_token`.
        controls: special tokens that may stand in no message.
        eos_token: ends a text.
        bos_token: starts a raw text; empty where this tokenizer adds none.
        bos_id: of `bos_token`, or None.
        stop_ids: tokens that generation stops at.
        stop_tokens: the same as text.
    """

    tokenizer: str
    template: str
    template_name: str
    special_tokens: dict[str, Any]
    controls: tuple[str, ...]
    eos_token: str
    bos_token: str
    bos_id: int | None
    stop_ids: frozenset[int]
    stop_tokens: tuple[str, ...]

    @cached_property
    def backend(self) -> Any:
        """The tokenizer; threads may share it."""
        from tokenizers import Tokenizer

        return _with_memory(Tokenizer.from_str(self.tokenizer))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token in the vocabulary."""
        return max(map(len, self.backend.get_vocab()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "backend"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, with the character spans [start, end) that are supervised, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row ready to train on.

    Attributes:
        input_ids: T token ids.
        spans: [start, end) of the token positions that have to be predicted. Position 0 is never
            among them: nothing comes before it to predict it from.
    """

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def supervised(self) -> list[int]:
        """T values 0 or 1."""
        mask = [0] * len(self.input_ids)
        for start, end in self.spans:
            mask[start:end] = [1] * (end - start)
        return mask

    def cut(self, start: int, end: int) -> Tokens:
        """The positions [start, end) as a row."""
        spans = [(max(s - start, 1), min(e, end) - start) for s, e in self.spans]
        return Tokens(self.input_ids[start:end], tuple((s, e) for s, e in spans if s < e))


def load_tokenizer(path: str, *, trust_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Args:
        path: the model's folder.
        trust_code: run the folder's own Python code, whose pin was checked.

    Raises:
        ModelError: it can't be loaded.
        DataError: it is none of the fast ones, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_code)
    except (OSError, *_STUMBLES) as error:
        raise ModelError(
            f"the tokenizer of {path} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer of {path} is a slow one: tokenizer.json is needed")
    if tokenizer.eos_token is None:
        raise DataError(f"the tokenizer of {path} has no end-of-sequence token")
    return tokenizer


def chat_format(tokenizer: Any, folder: Path | None = None, fallback: str = "") -> ChatFormat:
    """What of a tokenizer matters for rendering and encoding.

    Args:
        tokenizer: of transformers, a fast one.
        folder: of the model, for the tokens that its generation_config.json stops at.
        fallback: name of the template for a tokenizer that has none.

    Raises:
        DataError: no chat template, or one that is no template.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
    template, name = tokenizer.chat_template, "tokenizer"
    if isinstance(template, dict):  # several named ones
        template = template.get("default")
    if not template and fallback:
        eos = json.dumps(tokenizer.eos_token)
        template = json.dumps(bos).join(("{{ ", " }}")) if bos else ""
        template += FALLBACK_TEMPLATES[fallback].replace("EOS", eos)
        name = fallback
    if not template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: take an instruct "
            "model, or name a template with data.fallback_template "
            f"({', '.join(FALLBACK_TEMPLATES)})"
        )
    try:
        _compile_jinja_template(template)
    except TemplateError as error:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} is malformed: {error}"
        ) from error
    backend = _bare(tokenizer.backend_tokenizer)
    stops = frozenset(_stop_ids(tokenizer, folder))
    made = ChatFormat(
        tokenizer=backend.to_str(),
        template=template,
        template_name=name,
        special_tokens=dict(tokenizer.special_tokens_map),
        controls=tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ),
        eos_token=tokenizer.eos_token,
        bos_token=bos,
        bos_id=tokenizer.bos_token_id,
        stop_ids=stops,
        stop_tokens=tuple(sorted(filter(None, map(backend.id_to_token, stops)))),
    )
    made.__dict__["backend"] = _with_memory(backend)  # as if it were read from its text
    return made


def _bare(backend: Any) -> Any:
    """A tokenizer of `tokenizers` without what it does to a text's tokens afterwards.

    Some families (Llama 3) trim white space off the offsets there, which would take the spaces out
    of the mask. It is of no other use here: templates write the special tokens.
    """
    from tokenizers import processors

    # one around the same model, which takes long to read
    bare = type(backend)(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(bare, part, getattr(backend, part))
    added = backend.get_added_tokens_decoder()
    for token in (added[number] for number in sorted(added)):
        (bare.add_special_tokens if token.special else bare.add_tokens)([token])
    if repr(bare.get_added_tokens_decoder()) != repr(added):  # ids that are not in a row
        bare = type(backend).from_str(backend.to_str())
    bare.no_truncation()
    bare.no_padding()
    bare.post_processor = processors.Sequence([])
    return bare


def _with_memory(backend: Any) -> Any:
    # By default 10,000 words are remembered, fewer than a language has: 1.1 times as fast.
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(_WORDS_REMEMBERED)
    return backend


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


def _stop_ids(tokenizer: Any, folder: Path | None) -> Iterable[int]:
    yield tokenizer.eos_token_id
    try:
        values = json.loads(((folder or Path()) / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return
    stops = values.get("eos_token_id") if isinstance(values, dict) else None
    yield from [s for s in (stops if isinstance(stops, list) else [stops]) if isinstance(s, int)]


@dataclass
class Renderer:
    """Renders and encodes chats of one `ChatFormat`."""

    format: ChatFormat
    loss: Loss = "assistant"
    _ends: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._template = _compile_jinja_template(self.format.template)
        _read_loops_directly(self._template.environment)
        self._names = {
            **self._template.globals,
            "tools": None,
            "documents": None,
            **self.format.special_tokens,
        }
        self._context = self._template.new_context(self._names, shared=True)
        self.backend = self.format.backend
        # what generation stops at need not be flagged as special in the tokenizer
        controls = (*self.format.controls, *self.format.stop_tokens)
        # any special token may end a turn: <|im_end|>, <|eot_id|>, </s>, <end_of_turn>, ...
        self._ends = (self.format.eos_token, *controls)
        self._controls = _any_of(controls)
        self._stops = _any_of(self.format.stop_tokens)
        self._stops_after = re.compile(rf"\s*(?:{self._stops.pattern})")
        self._reads_tools = "tools" in self.format.template
        self._reads_calls = "tool_calls" in self.format.template
        self._reads_reasoning = "reasoning_content" in self.format.template
        # SentencePiece's kind may put a space before every text that is encoded: an answer encoded
        # apart would start with one that serving does not have
        self._apart = self.backend.encode("b", add_special_tokens=False).tokens == ["b"]
        self._clean_border = lru_cache(65536)(self._clean_border_of)
        self._separates = lru_cache(1024)(self._separates_of)
        self._sharing = _SHARING

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def template_text(
        self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False
    ) -> str:
        """The messages as text; with `prompt`, what a server gives the model to answer them.

        Raises:
            BadRow: the template refuses them.
        """
        from jinja2.exceptions import TemplateError

        try:
            if tools is None and max(map(len, messages), default=0) == 2:
                # What render_jinja_template does for plain messages, without copying them and
                # without a new context, which takes as long as the rendering itself.
                self._names |= {"messages": messages, "add_generation_prompt": prompt}
                self._context.vars.clear()
                self._context.exported_vars.clear()
                return "".join(self._template.root_render_func(self._context))
            from transformers.utils.chat_template_utils import render_jinja_template

            texts, _ = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.format.template,
                add_generation_prompt=prompt,
                **self.format.special_tokens,
            )
        except (TemplateError, *_STUMBLES) as error:
            # the template is the model's code: what it stumbles over is its word on the row
            raise BadRow(
                "template_error", f"the chat template refuses the chat: {_line(error)}"
            ) from error
        return texts[0]

    def render(self, record: Record, loss: Loss | None = None) -> list[Rendered]:
        """Render a row and find what is supervised; several where turns need rows of their own.

        The last one is the conversation's end. `loss` overrides the renderer's own.

        Raises:
            BadRow: the template refuses the chat, leaves out a message, a call or a tool, or does
                not render an answer as the continuation of its prompt (what training sees would not
                be what serving renders).
        """
        if not record.messages:
            self._check_controls(record.text)
            text = self.format.bos_token + record.text + self.format.eos_token
            return [Rendered(text, ((0, len(text)),))]
        messages, tools = record.messages, record.tools
        for message in messages:
            if len(message) == 2 and "content" in message:
                self._check_controls(message["content"])
                continue
            for value in message.values():
                if isinstance(value, str):
                    self._check_controls(value)
            if "tool_calls" in message:
                if not self._reads_calls:
                    raise BadRow("template_error", "the chat template does not render tool calls")
                self._check_controls(as_json(message["tool_calls"]))
            if "reasoning_content" in message and not self._reads_reasoning:
                raise BadRow(
                    "template_error",
                    "the chat template does not render reasoning_content: remove it, or take a "
                    "model that reasons",
                )
        if tools:
            if not self._reads_tools:
                raise BadRow("template_error", "the chat template does not render tools")
            self._check_controls(as_json(tools))
        loss = loss or self.loss
        if loss == "all":
            text, _ = self._ended(self.template_text(messages, tools))
            _check_whole(messages, tools, text)
            return [Rendered(text, ((0, len(text)),))]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if loss == "last":
            answers = answers[-1:]
        rows: list[Rendered] = []
        text, spans = "", []
        for index in reversed(answers):
            start, through = self._turn(messages, tools, index)
            end = len(through)
            if spans and not text.startswith(through):
                rows.append(Rendered(text, tuple(reversed(spans))))
                spans = []
            if not spans:
                text, end = self._ended(through)
                _check_whole(messages[: index + 1], tools, text)
            elif not self._stops.search(through, start):
                # GLM stops at the token that opens the next turn
                following = self._stops_after.match(text, end)
                end = following.end() if following else end
            spans.append((start, end))
        rows.append(Rendered(text, tuple(reversed(spans))))
        return rows[::-1]

    def _turn(self, messages: Sequence[Message], tools: Any, index: int) -> tuple[int, str]:
        """Start of the answer `messages[index]` in the text that ends with it, and that text."""
        prompt = self.template_text(messages[:index], tools, prompt=True)
        through = self.template_text(messages[: index + 1], tools)
        if not through.startswith(prompt):
            raise BadRow(
                "round_trip",
                "the chat template renders the answer differently in a conversation than after its "
                "prompt, so that training would not see what serving renders: message "
                f"{index + 1} of {len(messages)}",
            )
        answer = through[len(prompt) :]
        # What the template puts behind the token that generation stops at, a line break or the end
        # of the text (Phi-3), is not the model's to say.
        stop = self._stops.search(answer)
        answer = answer[: stop.end()] if stop else answer.rstrip()
        if not answer:
            raise BadRow(
                "round_trip",
                f"the chat template renders nothing of the answer, message {index + 1}",
            )
        return len(prompt), prompt + answer

    def _ended(self, text: str) -> tuple[str, int]:
        """The text with an end token, and its length."""
        stripped = text.rstrip()
        if stripped.endswith(self._ends):
            return stripped, len(stripped)
        # a template that does not end the last turn leaves the model no way to learn to stop
        text = stripped + self.format.eos_token
        return text, len(text)

    def _check_controls(self, content: str) -> None:
        if found := self._controls.search(content):
            raise BadRow(
                "control_token",
                f"the text holds the control token {found.group()!r}, which would end or open a "
                "turn where none does: escape or remove it",
            )

    def answer(self, rendered: Rendered) -> str:
        """The text of the last answer as the model has to write it, without the end token.

        That can be more than the row's own content: some templates put an empty thinking block
        first.
        """
        start, end = rendered.spans[-1]
        text = rendered.text[start:end]
        for token in self._ends:
            text = text.removesuffix(token)
        return text

    def too_long(self, rendered: Rendered, max_seq_len: int) -> bool:
        """True where the text is longer than any `max_seq_len` tokens of the vocabulary can be."""
        length = len(rendered.text)
        return length > max_seq_len and length > max_seq_len * self.format.longest_token

    def encode(self, rows: Sequence[Rendered]) -> list[list[Tokens]]:
        """Encode rendered texts; each gives one row, or one per turn where borders merge."""
        encoded: list[list[Tokens]] = [[] for _ in rows]
        apart, whole = [], []
        for number, row in enumerate(rows):
            one_turn = len(row.spans) == 1 and row.spans[0][0] > 0
            (apart if self._apart and one_turn else whole).append(number)
        self._encode_apart([rows[n] for n in apart], [encoded[n] for n in apart])
        again = self._encode_whole([rows[n] for n in whole], [encoded[n] for n in whole])
        for position in again:
            row, into = rows[whole[position]], encoded[whole[position]]
            turns = [Rendered(row.text[:end], ((start, end),)) for start, end in row.spans]
            self._encode_apart(turns, [into] * len(turns))
        return encoded

    def _encode_apart(self, rows: Sequence[Rendered], into: Sequence[list[Tokens]]) -> None:
        prompts = [row.text[: row.spans[0][0]] for row in rows]
        shared = self._shared_start(prompts) if len(rows) >= self._sharing else ""
        cut, head = len(shared), self._ids(shared)
        texts = []
        for row in rows:
            start, end = row.spans[0]
            texts.append(row.text[cut:start])
            texts.append(row.text[start:end])
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        if shared and head + encodings[0].ids != self._ids(prompts[0]):
            self._sharing = sys.maxsize  # a kind of tokenizer that was not thought of
            self._encode_apart(rows, into)
            return
        for position, tokens in enumerate(into):
            prompt = head + encodings[2 * position].ids
            start = len(prompt)
            prompt += encodings[2 * position + 1].ids
            span = (max(start, 1), len(prompt))
            tokens.append(Tokens(prompt, (span,) if span[0] < span[1] else ()))

    def _shared_start(self, prompts: Sequence[str]) -> str:
        """What all prompts start with, as a system message, up to a control token.

        A control token is cut out of a text before the rest is split into words, so that what
        follows it has the same tokens alone: only those are taken for which that holds.
        """
        shared = commonprefix(prompts)  # noqa: RUF071  characters are meant
        ends = [
            found.end()
            for found in self._controls.finditer(shared)
            if self._separates(found.group())
        ]
        return shared[: ends[-1]] if ends else ""

    def _separates_of(self, control: str) -> bool:
        added = self.backend.get_added_tokens_decoder().values()
        return all(
            not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            if token.content == control
            # one that could be found in its place or across its ends, or looks at its last letter
            else not token.single_word
            and control not in token.content
            and not any(
                control.endswith(token.content[:n]) or control.startswith(token.content[-n:])
                for n in range(1, len(token.content))
            )
            for token in added
        ) and any(token.content == control for token in added)

    def _encode_whole(self, rows: Sequence[Rendered], into: Sequence[list[Tokens]]) -> list[int]:
        """Encode each text as a whole; returns the positions of rows that have to be taken apart.

        A token that overlaps a supervised span is supervised.
        """
        encodings = self.backend.encode_batch([row.text for row in rows], add_special_tokens=False)
        again = []
        for position, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            if row.spans == ((0, len(row.text)),):
                ids = encoding.ids
                into[position].append(Tokens(ids, ((1, len(ids)),) if len(ids) > 1 else ()))
                continue
            spans, clean = _token_spans(encoding, row)
            if self._apart and not (clean and self._clean_borders(row)):
                again.append(position)
            else:
                into[position].append(Tokens(encoding.ids, spans))
        return again

    def _clean_borders(self, row: Rendered) -> bool:
        return all(
            self._clean_border(row.text[max(0, start - 8) : start], row.text[start : start + 2])
            for start, _ in row.spans
        )

    def _clean_border_of(self, left: str, right: str) -> bool:
        # Splitting rules look ahead from a run of white space to what follows it, so that a prompt
        # which ends in one may be split differently alone; nothing else reaches over a border.
        if not left[-1:].isspace():
            return True
        alone = self._ids(left)
        return self._ids(left + right)[: len(alone)] == alone


def _check_whole(messages: Sequence[Message], tools: Any, text: str) -> None:
    """Refuse a text that lacks something of the chat.

    The system message may be anywhere (Mistral puts it before the last question); all others have
    to come in order. Of an earlier answer the thinking may be gone, of the last one not.

    Raises:
        BadRow: names what is missing.
    """
    if not tools and _all_in_order(messages, text):
        return
    if not _missing(messages, tools, text, str.strip):
        return
    # a template may write white space in its own way
    if missing := _missing(messages, tools, _squeezed(text), _squeezed):
        raise BadRow(
            "template_error",
            f"the chat template leaves out {missing}, or rewrites it, so that it would not be "
            "learned: take it out of the row, or choose another model",
        )


def _all_in_order(messages: Sequence[Message], text: str) -> bool:
    """True for the usual chat, which has contents only, all of them in the text as they are."""
    position = 0
    for message in messages:
        content = message.get("content")
        if content is None or len(message) > 2:
            return False
        position = text.find(content, position)
        if position < 0:
            return False
        position += len(content)
    return True


def _missing(
    messages: Sequence[Message], tools: Any, text: str, plain: Callable[[str], str]
) -> str:
    """The first thing of a chat that its text does not hold; empty where it holds all."""
    position, last = 0, len(messages)
    for number, message in enumerate(messages, 1):
        content, role = message.get("content", ""), message["role"]
        if role == "system":
            if plain(content) not in text and _end_of(content, text, 0, plain) < 0:
                return f"message {number} of {last}"
            continue
        wanted = plain(content)
        # what a tool gave is often written as JSON, and may be quoted later on as it is
        found = text.find(wanted, position) if role != "tool" else -1
        if found >= 0:
            position = found + len(wanted)
        else:
            parts = _THINKING.split(content)
            for part in parts if number == last else parts[-1:]:
                position = _end_of(part, text, position, plain)
                if position < 0:
                    return f"message {number} of {last}"
        if len(message) == 2 and "content" in message:
            continue
        if number == last and _end_of(message.get("reasoning_content", ""), text, 0, plain) < 0:
            return f"the reasoning of message {number} of {last}"
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if _end_of(name, text, 0, plain) < 0:
                return f"the call of {name!r} in message {number} of {last}"
    for tool in tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and _end_of(name, text, 0, plain) < 0:
            return f"the tool {name!r}"
    return ""


def _end_of(content: str, text: str, position: int, plain: Callable[[str], str]) -> int:
    """Where a string of the chat first ends in its text, as it is or escaped; -1 if nowhere."""
    ends = []
    for written in (content, as_json(content)[1:-1], json.dumps(content)[1:-1]):
        written = plain(written)
        if (found := text.find(written, position)) >= 0:
            ends.append(found + len(written))
    return min(ends, default=-1)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _token_spans(encoding: Any, row: Rendered) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Token positions of the character spans, and whether tokens start and end where they do."""
    spans, clean = [], True
    offsets = None
    length = len(encoding)
    for start, end in row.spans:
        first = encoding.char_to_token(start)
        after = encoding.char_to_token(end) if end < len(row.text) else length
        if first is None or after is None:  # a character that belongs to no token
            offsets = offsets or encoding.offsets
            first = next((i for i, (_, e) in enumerate(offsets) if e > start), length)
            after = next((i for i, (s, _) in enumerate(offsets) if s >= end), length)
            clean = False
        else:
            clean = clean and encoding.token_to_chars(first)[0] == start
            if after < length and encoding.token_to_chars(after)[0] < end:
                after, clean = after + 1, False
        first = max(first, 1)
        if first < after:
            spans.append((first, after))
    return tuple(spans), clean


def fit(tokens: Tokens, max_seq_len: int, overflow: Overflow, bos_id: int | None) -> list[Tokens]:
    """A row within `max_seq_len`: none where it is dropped, several where it is split."""
    length = len(tokens.input_ids)
    if length <= max_seq_len:
        return [tokens]
    if overflow == "drop":
        return []
    if overflow == "truncate_right":
        return [tokens.cut(0, max_seq_len)]
    if overflow == "truncate_left":
        if tokens.input_ids[0] != bos_id:
            return [tokens.cut(length - max_seq_len, length)]
        kept = tokens.cut(length - max_seq_len + 1, length)  # models need their first token
        spans = tuple((start + 1, end + 1) for start, end in kept.spans)
        return [Tokens([tokens.input_ids[0], *kept.input_ids], spans)]
    return [tokens.cut(i, min(i + max_seq_len, length)) for i in range(0, length, max_seq_len)]


def _read_loops_directly(environment: Any) -> None:
    """Let `loop.first` and the like be read without the sandbox's checks.

    They are jinja's own attributes, and asking for each whether it is safe took a third of the time
    that a template takes. What is called is checked as before.
    """
    from jinja2.runtime import LoopContext

    checked = type(environment).getattr
    public = {name for name in dir(LoopContext) if not name.startswith("_")}

    def read(obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute in public:
            return getattr(obj, attribute)
        return checked(environment, obj, attribute)

    environment.getattr = read


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")
