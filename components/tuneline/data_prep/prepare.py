"""Raw chats -> PreparedDataset: checked, rendered, tokenized, masked and split.

Rows stream through in batches; what stays in memory is a digest a row (about 100 bytes) for finding
duplicates. The split of a row is decided by a hash of its opening (what comes before the first
answer), so that a growing data set never moves a row from one split to another, and a conversation
and its continuation, which share answers to learn, are never in different ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.data_prep import chat
from tuneline.data_prep.records import Record, digest_of_source, read_records
from tuneline.errors import DataError
from tuneline.progress import report
from tuneline.recipe import DataSection

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
TEST_ROWS: Final = "test_rows.jsonl"
CONTRACT: Final = "contract.json"
_BATCH_ROWS: Final = 1000


@dataclass
class SplitCounts:
    """What went into one split."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0


@dataclass
class Contract:
    """Counts of everything that came in, and why rows went missing."""

    rows_in: int = 0
    duplicates_dropped: int = 0
    in_test_dropped: int = 0
    """Training rows that open like a row of the test files."""
    too_long_dropped: int = 0
    splits: dict[str, SplitCounts] = field(
        default_factory=lambda: {s: SplitCounts() for s in SPLITS}
    )


def prepare(model_reference: str, data: DataSection, output: Path) -> Artifact:
    """Prepare a data set for one base model.

    Args:
        model_reference: the base model whose tokenizer and chat template render the rows.
        data: sources, split and length limit.
        output: folder of the PreparedDataset.

    Raises:
        DataError: a file or row that can't be used, or a split without rows.
        ModelError: the base model can't be used.
    """
    base = base_model.resolve(model_reference)
    tokenizer = chat.load_tokenizer(str(base.path), trust_code=base.trusts_code)
    contract = Contract()
    with artifacts.writing(output) as aside:
        with ExitStack() as stack:
            sinks = {split: stack.enter_context(_ArrowSink(aside, split)) for split in SPLITS}
            test_rows = stack.enter_context((aside / TEST_ROWS).open("w", encoding="utf-8"))
            for split, record, rendered, tokens in _rows(tokenizer, data, contract):
                sinks[split].add(tokens)
                _count(contract.splits[split], tokens)
                if split == "test":
                    test_rows.write(_test_row(tokenizer, record, rendered) + "\n")
        _check(contract, data)
        (aside / CONTRACT).write_text(json.dumps(asdict(contract), indent=2) + "\n")
        artifacts.seal(
            aside,
            kind="prepared_dataset",
            config=data.model_dump(mode="json"),
            base_model=base.identity(),
            inputs={source: digest_of_source(source) for source in (*data.train, *data.test)},
        )
    for split, counts in contract.splits.items():
        share = counts.supervised_tokens / max(counts.tokens, 1)
        report(f"{split}: {counts.rows} rows, {counts.tokens} tokens, {share:.0%} supervised")
    return artifacts.load(output, "prepared_dataset")


def _rows(
    tokenizer: Any, data: DataSection, contract: Contract
) -> Iterator[tuple[Split, Record, chat.Rendered, chat.Tokens]]:
    test_openings: set[bytes] = set()
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    # the named test files come first, so that training rows can be checked against them
    for source, is_test in [(s, True) for s in data.test] + [(s, False) for s in data.train]:
        records = read_records(source)
        while batch := list(islice(records, _BATCH_ROWS)):
            contract.rows_in += len(batch)
            kept = []
            for record in batch:
                content = _digest(record.messages)
                opening = _digest(_opening(record))
                if content in seen[is_test]:
                    contract.duplicates_dropped += 1
                elif not is_test and opening in test_openings:
                    contract.in_test_dropped += 1
                else:
                    seen[is_test].add(content)
                    if is_test:
                        test_openings.add(opening)
                    kept.append((_split_of(opening, data, is_test), record))
            yield from _render_batch(tokenizer, kept, data, contract)


def _render_batch(
    tokenizer: Any,
    rows: Sequence[tuple[Split, Record]],
    data: DataSection,
    contract: Contract,
) -> Iterator[tuple[Split, Record, chat.Rendered, chat.Tokens]]:
    rendered = []
    for _, record in rows:
        try:
            rendered.append(chat.render(tokenizer, record.messages))
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error
    for (split, record), text, tokens in zip(
        rows, rendered, chat.tokenize(tokenizer, rendered), strict=True
    ):
        if len(tokens.input_ids) > data.max_seq_len:
            contract.too_long_dropped += 1
        elif not any(tokens.supervised):
            raise DataError(f"{record.where}: no token of the answer is left to learn from")
        else:
            yield split, record, text, tokens


def _split_of(digest: bytes, data: DataSection, is_test: bool) -> Split:
    if is_test:
        return "test"
    share = int.from_bytes(digest[:8], "big") / 2**64
    test_fraction = 0.0 if data.test else data.test_fraction
    if share < test_fraction:
        return "test"
    return "validation" if share < test_fraction + data.validation_fraction else "train"


def _opening(record: Record) -> tuple[dict[str, str], ...]:
    # a greeting of the assistant opens many different conversations
    roles = [message["role"] for message in record.messages]
    user = roles.index("user") if "user" in roles else 0
    return record.messages[: roles.index("assistant", user)] or record.messages


def _digest(messages: Iterable[dict[str, str]]) -> bytes:
    text = json.dumps(list(messages), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()[:16]


def _test_row(tokenizer: Any, record: Record, rendered: chat.Rendered) -> str:
    row = {
        "prompt": chat.render_prompt(tokenizer, record.messages[:-1]),
        "question": "".join(message["content"] for message in record.messages[-2:-1]),
        "reference": chat.answer(tokenizer, rendered),
    }
    return json.dumps(row, ensure_ascii=False)


def _count(counts: SplitCounts, tokens: chat.Tokens) -> None:
    counts.rows += 1
    counts.tokens += len(tokens.input_ids)
    counts.supervised_tokens += sum(tokens.supervised)
    counts.longest_tokens = max(counts.longest_tokens, len(tokens.input_ids))


def _check(contract: Contract, data: DataSection) -> None:
    for split in SPLITS:
        needed = split != "validation" or data.validation_fraction > 0
        if needed and not contract.splits[split].rows:
            lost = contract.rows_in - sum(c.rows for c in contract.splits.values())
            raise DataError(
                f"the {split} split has no rows ({contract.rows_in} came in, {lost} were dropped: "
                f"{contract.too_long_dropped} longer than max_seq_len {data.max_seq_len}, "
                f"{contract.duplicates_dropped} duplicates, {contract.in_test_dropped} also in the "
                "test files): give more rows, a larger fraction or a larger max_seq_len"
            )


class _ArrowSink:
    """Streams rows of one split into an Arrow file that `datasets` maps into memory."""

    def __init__(self, folder: Path, split: Split) -> None:
        import pyarrow as pa

        self._schema = pa.schema(
            [("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.int8()))]
        )
        self._writer = pa.ipc.new_stream(str(folder / f"{split}.arrow"), self._schema)
        self._rows: list[chat.Tokens] = []

    def add(self, tokens: chat.Tokens) -> None:
        self._rows.append(tokens)
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = {
            "input_ids": [row.input_ids for row in self._rows],
            "supervised": [row.supervised for row in self._rows],
        }
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows.clear()

    def __enter__(self) -> _ArrowSink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def load_split(dataset: Artifact, split: Split) -> Any:
    """A `datasets.Dataset` over one split, mapped from disk, nothing copied."""
    from datasets import Dataset

    return Dataset.from_file(str(dataset.path / f"{split}.arrow"))
