"""One raw row -> a checked chat (or raw text), whatever format it came in.

The formats, told apart by their keys:

    messages           OpenAI's: role, content, tool_calls; `tools` beside it
    sharegpt           `conversations` of {from, value}; `system` and `tools` beside it
    alpaca             instruction, input, output, history
    prompt_completion  two texts, or two lists of messages
    text               raw text, learned as a whole

Every fault is a `BadRow`: a sentence for a person, and a reason that is counted.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

from tuneline.errors import DataError
from tuneline.recipe import Source

ROLES: Final = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_MESSAGE_KEYS: Final = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
)
_SCALARS: Final = (str, int, float, bool)
_LONGEST_SLICE: Final = 200
"""Characters of a column's value from which it names no slice."""
_SENTENCE_HEAD: Final = 240
_SENTENCE_TAIL: Final = 160
"""Characters of a fault's sentence that are kept at its start and its end; the value is between."""
_DEEPEST: Final = 100
"""Levels of a tool's schema or of a call's arguments; templates and JSON walk them recursively."""
_BRACKETS: Final = {"{": 1, "[": 1, "}": -1, "]": -1}
_TURN_KEYS: Final = frozenset(("from", "value"))
_WEIGHTS: Final = ", and weight where it is 1 of an answer or 0 of another turn"
_MEDIA: Final = ("images", "image", "videos", "video", "audios", "audio")
# Surrogates come from broken escapes; of the control characters, text has tab, newline, form feed
# and carriage return only.
_BROKEN: Final = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0e-\x1f]")

Message = dict[str, Any]


class BadRow(DataError):
    """A row that can't be used.

    Attributes:
        reason: what the contract counts it under.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        self.reason = reason
        if len(sentence) > _SENTENCE_HEAD + _SENTENCE_TAIL:
            left_out = len(sentence) - _SENTENCE_HEAD - _SENTENCE_TAIL
            head, tail = sentence[:_SENTENCE_HEAD], sentence[-_SENTENCE_TAIL:]
            sentence = f"{head} [... {left_out} characters ...] {tail}"
        # a name out of the row may hold half a character, which no report can be written with
        super().__init__(sentence.encode("utf-8", "backslashreplace").decode())


@dataclass(slots=True)
class Record:
    """A chat that ends with the answer to learn, or raw text."""

    messages: list[Message]
    """Empty for raw text."""
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other short values, by column; a slice of an evaluation is one of them."""
    values_left_out: int = 0
    """Of other columns: NaN and infinite numbers, which JSON has none of."""
    id: Any = None
    format: str = "messages"
    weightless: bool = False
    """A turn that is no answer has weight 0: it is not to be learned."""


def parse_line(line: bytes) -> Any:
    """The JSON value of one line.

    Raises:
        BadRow: not UTF-8, not JSON, or an object that has a key twice.
    """
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            "not_utf8", f"not UTF-8 (byte {error.start}): save the file as UTF-8"
        ) from error
    except RecursionError as error:
        raise BadRow("malformed_json", "malformed JSON: nested too deeply") from error
    except ValueError as error:
        mark = "a byte order mark amid the file: " if line.startswith(codecs.BOM_UTF8) else ""
        raise BadRow("malformed_json", f"malformed JSON: {mark}{error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("malformed_json", f"malformed JSON: key {twice!r} is there more than once")
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)


def parse_record(row: Any, source: Source) -> Record:
    """Check one row and bring it into one form.

    Raises:
        BadRow: it is in no known format, or no chat that ends with a non-empty answer.
    """
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"is {_kind(row)}, an object with named columns is needed")
    if source.columns:
        row = _renamed(row, source.columns)
    name = source.format if source.format != "auto" else _detect(row)
    for key in _MEDIA:
        if row.get(key):
            raise BadRow(
                "wrong_type",
                f"has {key}, of which nothing is read: remove them to learn from the text alone",
            )
    record = _PARSERS[name](row)
    record.format = name
    record.id = row.get("id")
    if not record.messages and not record.text:
        raise BadRow("empty", "has no text")
    if record.messages:
        _check_order(record.messages)
        for message in record.messages:
            if len(message) > 2 and message.pop("weight", None) == 0:
                record.weightless = True
    consumed = _COLUMNS[name]
    for key, value in row.items():
        if key not in consumed and isinstance(value, _SCALARS) and not _BROKEN.search(key):
            if isinstance(value, float) and not math.isfinite(value):
                record.values_left_out += 1
                continue
            text = str(value)
            if len(text) <= _LONGEST_SLICE and not _BROKEN.search(text):
                record.columns[key] = value
    return record


def _renamed(row: Mapping[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise BadRow(
            "missing_column",
            f"has no column {', '.join(map(repr, missing))}, which `columns` names; columns here "
            f"are {_names(row)}",
        )
    taken = set(columns.values())
    renamed = {key: value for key, value in row.items() if key not in taken}
    return renamed | {key: row[column] for key, column in columns.items()}


def _detect(row: Mapping[str, Any]) -> str:
    for name, keys in _DETECTED_BY.items():
        if all(row.get(key) is not None for key in keys):
            return name
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise BadRow(
            "unknown_format",
            "is a preference pair (chosen, rejected), which supervised tuning does not read: map "
            "the answer to learn with `columns: {prompt: prompt, completion: chosen}`",
        )
    for keys in _DETECTED_BY.values():
        nulls = [key for key in keys if key in row and row[key] is None]
        if nulls and all(key in row for key in keys):
            raise BadRow("empty", f"{' and '.join(nulls)} is null, so there is nothing to learn")
    raise BadRow(
        "unknown_format",
        f"is in no known format (columns {_names(row)}): needed are messages; conversations; "
        "instruction and output; prompt and completion; or text. `columns` maps other names",
    )


def _from_messages(row: Mapping[str, Any]) -> Record:
    messages = _messages(_decoded(row.get("messages"), "messages"), "messages")
    return Record(messages, tools=_tools(row))


def _from_sharegpt(row: Mapping[str, Any]) -> Record:
    turns = _decoded(row.get("conversations"), "conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow("empty", f"conversations is {_kind(turns)}, a list of turns is needed")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow("wrong_type", f"turn {number} is {_kind(turn)}, an object is needed")
        if "from" not in turn and "role" in turn:  # OpenAI's keys under ShareGPT's name
            messages.append(_message(turn, number))
            continue
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadRow(
                "unknown_role",
                f"turn {number}: from {speaker!r} is unknown: {', '.join(_SHAREGPT_ROLES)}",
            )
        if len(turn) > 2 and (others := _unknown(turn, _TURN_KEYS, role)):
            raise BadRow(
                "unknown_key",
                f"turn {number}: keys {others} are not supported; keys are "
                f"{', '.join(sorted(_TURN_KEYS))}{_WEIGHTS}",
            )
        if speaker == "function_call":
            call = _decoded(turn.get("value"), "value")
            message = {"role": role, "tool_calls": call if isinstance(call, list) else [call]}
        else:
            message = {"role": role, "content": turn.get("value")}
        if "weight" in turn:
            message["weight"] = turn["weight"]
        messages.append(_message(message, number))
    return Record(_with_system(row, messages), tools=_tools(row))


def _from_alpaca(row: Mapping[str, Any]) -> Record:
    messages: list[Message] = []
    history = _decoded(row.get("history"), "history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise BadRow("wrong_type", f"history is {_kind(history)}, a list of pairs is needed")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow("wrong_type", "history must hold pairs [instruction, output]")
        messages += _exchange(pair[0], pair[1], "history", "history")
    instruction = _text(row.get("instruction"), "instruction")
    if row.get("input") not in (None, ""):
        instruction = f"{instruction}\n\n{_text(row['input'], 'input')}"
    messages += _exchange(instruction, row.get("output"), "instruction", "output")
    return Record(_with_system(row, messages))


def _from_prompt_completion(row: Mapping[str, Any]) -> Record:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list):
        answer = [completion] if isinstance(completion, dict) else completion
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(answer, list):
            raise BadRow("wrong_type", f"completion is {_kind(completion)}, messages are needed")
        return Record(_messages([*prompt, *answer], "prompt"), tools=_tools(row))
    messages = _exchange(prompt, completion, "prompt", "completion")
    return Record(_with_system(row, messages), tools=_tools(row))


def _from_text(row: Mapping[str, Any]) -> Record:
    text = _text(row.get("text"), "text")
    if _is_blank(text):
        raise BadRow("empty", "text is empty")
    return Record([], text=text)


_PARSERS: Final = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}
_DETECTED_BY: Final = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_COLUMNS: Final = {
    "messages": {"messages", "tools"},
    "sharegpt": {"conversations", "system", "tools"},
    "alpaca": {"instruction", "input", "output", "history", "system"},
    "prompt_completion": {"prompt", "completion", "system", "tools"},
    "text": {"text"},
}
FORMAT_COLUMNS: Final[frozenset[str]] = frozenset().union(*_COLUMNS.values(), _MEDIA, ("id",))
"""All that a row may be made from."""


def _exchange(question: Any, answer: Any, asked: str, answered: str) -> list[Message]:
    question, answer = _text(question, asked), _text(answer, answered)
    if _is_blank(question):
        raise BadRow("empty_turn", f"{asked} is empty")
    if _is_blank(answer):
        raise BadRow("empty_turn", f"{answered} is empty: there is nothing to learn")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _messages(values: Any, name: str) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise BadRow("empty", f"{name} is {_kind(values)}, a list of messages is needed")
    return [_message(value, number) for number, value in enumerate(values, 1)]


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"message {number}: is {_kind(value)}, an object is needed")
    role, content = value.get("role"), value.get("content")
    if (  # the usual one, in a third of the time
        len(value) == 2
        and (role == "user" or role == "assistant")
        and isinstance(content, str)
        and not _BROKEN.search(content)
        and not _is_blank(content)
    ):
        return {"role": role, "content": content}
    if role == "developer":  # OpenAI's later name
        role = "system"
    if role not in ROLES:
        raise BadRow(
            "unknown_role",
            f"message {number}: role {role!r} is unknown: roles are {', '.join(ROLES)}",
        )
    if len(value) > 2 and (others := _unknown(value, _MESSAGE_KEYS, role)):
        raise BadRow(
            "unknown_key",
            f"message {number}: keys {others} are not supported; keys are "
            f"{', '.join(sorted(_MESSAGE_KEYS))}{_WEIGHTS}",
        )
    message: Message = {"role": role}
    if value.get("weight") == 0:
        message["weight"] = 0
    if value.get("tool_calls") is not None and (calls := _tool_calls(value["tool_calls"], number)):
        if role != "assistant":
            raise BadRow("wrong_type", f"message {number}: tool_calls of role {role}")
        message["tool_calls"] = calls
    if isinstance(content, list):
        content = _joined(content, number)
    if content is not None or "tool_calls" not in message:
        message["content"] = _text(content, f"message {number}: content")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if value.get(key) is not None:
            message[key] = _text(value[key], f"message {number}: {key}")
    if (
        role in ("user", "assistant")
        and "tool_calls" not in message
        and _is_blank(message["content"])
    ):
        whose = "the assistant's answer" if role == "assistant" else "the user's message"
        raise BadRow("empty_turn", f"message {number}: {whose} is empty")
    return message


def _unknown(value: Mapping[str, Any], known: frozenset[str], role: str) -> str:
    """Names of the other keys that hold something: prefix, images, weight 0 of an answer.

    One that is left out of account would change what is learned. Weight 1 of an answer does not,
    nor 0 of another turn, unless all text is learned.
    """
    return ", ".join(
        sorted(
            str(key)[:40]
            for key, held in value.items()
            if key not in known
            and held is not None
            and not (key == "weight" and held == (role == "assistant"))
        )
    )


def _joined(parts: Sequence[Any], number: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(_text(part.get("text"), f"message {number}: text of a content part"))
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow(
                "wrong_type",
                f"message {number}: content part {kind!r}: only text is read",
            )
    return "".join(texts)


def _tool_calls(values: Any, number: int) -> list[dict[str, Any]]:
    values = _decoded(values, f"message {number}: tool_calls")
    if values is None:
        return []
    if not isinstance(values, list):
        raise BadRow("wrong_type", f"message {number}: tool_calls is {_kind(values)}, not a list")
    calls = []
    for value in values:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong_type", f"message {number}: a tool call without a function's name")
        # templates write arguments as JSON: a string would be quoted once more
        arguments = _decoded(function.get("arguments", {}), f"message {number}: arguments")
        if not isinstance(arguments, dict):
            raise BadRow(
                "wrong_type", f"message {number}: arguments are {_kind(arguments)}, not an object"
            )
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(value.get("id"), str):
            call["id"] = value["id"]
        _check_json(call, f"message {number}: a tool call")
        calls.append(call)
    return calls


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if row.get("tools") is None:
        return None
    tools = _decoded(row["tools"], "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong_type", "tools must be a list of JSON schemas")
    _check_json(tools, "tools")
    return tools


def _decoded(value: Any, name: str) -> Any:
    """A list or object that a column of text holds as JSON."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return _DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed_json", f"{name} is text that is not JSON: {error}") from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} is {_kind(value)}, text is needed")
    _check_text(value, name)
    return value


def _is_blank(text: str) -> bool:
    """True for spaces and characters without a width, such as U+200B and U+FEFF, only."""
    stripped = text.strip()
    if not stripped or stripped.isascii():
        return not stripped
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in stripped)


def _check_json(value: Any, name: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError as error:
        raise BadRow("wrong_type", f"{name} has NaN or an infinite number: not JSON") from error
    except RecursionError as error:
        raise BadRow("wrong_type", f"{name} is nested too deeply") from error
    if text.count("{") + text.count("[") > _DEEPEST:
        # brackets in a string count too: what looks so deep is nothing that a person wrote
        levels = accumulate(_BRACKETS.get(character, 0) for character in text)
        if max(levels) > _DEEPEST:
            raise BadRow("wrong_type", f"{name} is nested in more than {_DEEPEST} levels")
    _check_text(text, name)


def _check_text(value: str, name: str) -> None:
    if found := _BROKEN.search(value):
        character = found.group()
        if character >= "\ud800":
            raise BadRow(
                "broken_text", f"{name} has half a character ({character!r}): a broken escape"
            )
        raise BadRow("broken_text", f"{name} has the control character {character!r}")


def _check_order(messages: Sequence[Message]) -> None:
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if (
            (role == "system" and number > 1)
            or (role == before and role in ("user", "assistant"))
            or (role == "tool" and before not in ("assistant", "tool"))
        ):
            raise BadRow(
                "roles_out_of_order",
                f"message {number}: {role} after {before or 'nothing'}: a system message comes "
                "first, user and assistant take turns, a tool answers an assistant",
            )
        before = role
    if before != "assistant":
        raise BadRow(
            "no_answer",
            f"no answer: the last message is from {before}, it must be the assistant's",
        )


def as_json(value: Any) -> str:
    """A value of a row as JSON text, its characters as they are; dates and such as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, str, dict)) and not value:
        return f"an empty {type(value).__name__}"
    return type(value).__name__


def _names(row: Mapping[str, Any]) -> str:
    names = [str(key)[:40] for key in row]
    return (", ".join(names[:12]) + (", ..." if len(names) > 12 else "")) or "none"


def opening(messages: Sequence[Message]) -> Sequence[Message]:
    """What comes before the first answer to a user.

    A greeting of the assistant opens many different conversations, so it does not count as one.
    """
    roles = [message["role"] for message in messages]
    user = roles.index("user") if "user" in roles else 0
    return messages[: roles.index("assistant", user)] or messages


def canonical(messages: Sequence[Message]) -> Iterator[bytes]:
    """The bytes that identify each message."""
    for message in messages:
        if len(message) == 2 and "content" in message:
            yield f"{message['role']} {len(message['content'])} {message['content']}".encode()
        else:
            yield json.dumps(message, sort_keys=True, default=str).encode("ascii")
