"""General text whose cross-entropy shows what tuning made the model forget.

`general_text.jsonl` was written for this project: short paragraphs of everyday prose on many
subjects, in English and some in Chinese. A base model that was trained on half the web finds them
about as probable as any plain text; a tuned one that finds them less so has lost some of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from tuneline.artifacts import digest_of
from tuneline.errors import DataError
from tuneline.evaluate.likelihood import Tokens, predicted_tokens

GENERAL: Final = "general text"
_LONGEST_TOKENS: Final = 512
"""Longer texts are cut: one long text must not outweigh the others."""


@dataclass(frozen=True)
class TextSet:
    """Texts as tokens, all of them to be predicted."""

    name: str
    digest: str
    """Of the texts, whatever the tokenizer."""
    rows: Sequence[Tokens]

    @property
    def tokens(self) -> list[int]:
        """Predicted tokens of each text."""
        return [predicted_tokens(supervised) for _, supervised in self.rows]


def read_text_sets(
    tokenizer: Any, named: Mapping[str, str], *, general: bool, max_rows: int
) -> list[TextSet]:
    """The project's own set and the named ones, tokenized as the model was pre-trained.

    Args:
        tokenizer: as it loads, with the special tokens that it adds to plain text.
        named: name -> a `.txt` file whose paragraphs are the texts, or JSON lines with `text`.
        general: whether the project's own set is among them.
        max_rows: at most so many texts of a file, the first.

    Raises:
        DataError: a file can't be read or holds no text.
    """
    sets = []
    if general:
        sets.append(_tokenized(tokenizer, GENERAL, general_texts()))
    for name, path in named.items():
        sets.append(_tokenized(tokenizer, name, read_texts(Path(path).expanduser(), max_rows)))
    return sets


def faults_of_text_sets(named: Mapping[str, str]) -> list[str]:
    """Why named sets can't be read, as far as their first text shows."""
    faults = []
    for path in named.values():
        try:
            read_texts(Path(path).expanduser(), 1)
        except DataError as error:
            faults.append(str(error))
    return faults


def general_texts() -> list[str]:
    """The project's own texts."""
    file = files("tuneline.evaluate").joinpath("general_text.jsonl")
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def read_texts(path: Path, max_rows: int) -> list[str]:
    """The first texts of a file: paragraphs of `.txt`, `text` of JSON lines.

    Raises:
        DataError: it can't be read, is of another form, or holds no text.
    """
    where = f"evaluation.forgetting_sets: {path}"
    try:
        with path.open(encoding="utf-8-sig") as file:
            texts = _paragraphs(file) if path.suffix == ".txt" else _rows(file, where)
            found = [text for text, _ in zip(texts, range(max_rows), strict=False)]
    except OSError as error:
        raise DataError(f"{where} can't be read ({error.strerror}): name a local file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start})") from error
    if not found:
        raise DataError(f"{where} holds no text")
    return found


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).strip()
            held = []
    if held:
        yield "".join(held).strip()


def _rows(lines: Iterator[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f'{where} line {number}: no JSON object with "text" (a file of plain paragraphs '
                "is named .txt)"
            ) from error
        if not isinstance(text, str):
            raise DataError(f"{where} line {number}: text is {type(text).__name__}, not a string")
        if text.strip():
            yield text


def _tokenized(tokenizer: Any, name: str, texts: Sequence[str]) -> TextSet:
    encoded = tokenizer(list(texts), truncation=True, max_length=_LONGEST_TOKENS)["input_ids"]
    rows = [(ids, [0] + [1] * (len(ids) - 1)) for ids in encoded if len(ids) > 1]
    if not rows:
        raise DataError(f"evaluation.forgetting_sets: {name}: no text has two tokens")
    return TextSet(name, digest_of(list(texts)), rows)
