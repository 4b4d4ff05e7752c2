"""Raw rows: read line by line, checked one by one, each fault with its file and line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneline.artifacts import digest_of, digest_of_file
from tuneline.errors import DataError

ROLES = ("system", "user", "assistant")
DEMO_SOURCES = {"demo:train": ("TRAIN", 650, 1), "demo:test": ("TEST", 100, 2)}
"""Source name -> vocabulary, rows, seed of the generator."""


@dataclass(frozen=True)
class Record:
    """One chat that ends with the answer to learn."""

    messages: tuple[dict[str, str], ...]
    where: str
    """File and line, for messages to a person."""


def read_records(source: str) -> Iterator[Record]:
    """The rows of a JSON-lines file or of a demo source.

    Raises:
        DataError: no such file, an empty file, or a row that can't be trained on.
    """
    if source in DEMO_SOURCES:
        from tuneline.demo import orders

        vocabulary, rows, seed = DEMO_SOURCES[source]
        for number, chat in enumerate(orders.generate(getattr(orders, vocabulary), rows, seed), 1):
            yield parse_record(chat, f"{source} row {number}")
        return
    path = Path(source).expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"data file {source} can't be read ({error.strerror}): give JSON-lines files or "
            f"{', '.join(DEMO_SOURCES)}"
        ) from error
    count = 0
    with file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            yield parse_record(
                _parse_line(line, f"{source} line {number}"), f"{source} line {number}"
            )
            count += 1
    if not count:
        raise DataError(f"data file {source} is empty: it needs one JSON object a line")


def digest_of_source(source: str) -> str:
    """SHA-256 of the file, or of what makes the rows of a demo source."""
    if source in DEMO_SOURCES:
        from tuneline.demo import orders

        vocabulary, rows, seed = DEMO_SOURCES[source]
        return digest_of([asdict(getattr(orders, vocabulary)), rows, seed])
    return f"sha256:{digest_of_file(Path(source).expanduser())}"


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON: {error}") from error


def parse_record(value: Any, where: str) -> Record:
    """Check one row of the `messages` format.

    Raises:
        DataError: it is no chat that ends with a non-empty answer.
    """
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where}: no 'messages' list (found {keys}): "
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} is needed'
        )
    if value.get("tools"):
        raise DataError(f"{where}: 'tools' are not supported: remove them or the row")
    parsed = tuple(_parse_message(m, f"{where}, message {n}") for n, m in enumerate(messages, 1))
    if parsed[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: no answer: the last message is from {parsed[-1]['role']}, "
            "it must be the assistant's"
        )
    for number, message in enumerate(parsed, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"{where}, message {number}: the assistant's answer is empty")
    return Record(parsed, where)


def _parse_message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {type(value).__name__}, an object is needed")
    if others := sorted(
        k for k, v in value.items() if k not in ("role", "content") and v is not None
    ):
        # weight 0, tool calls: a key that is left out of account would change what is learned
        raise DataError(
            f"{where}: keys {', '.join(others)} are not supported, only role and content"
        )
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is unknown: roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {type(content).__name__}, text is needed")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: content has half a character ({content[error.start]!r}): a broken escape"
        ) from error
    return {"role": role, "content": content}
