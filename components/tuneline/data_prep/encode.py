"""Blocks of raw rows -> blocks of tokens, as many at a time as there are cores, kept by content.

An encoded block is named by the digest of its raw rows and of everything that decides their tokens,
and stays in the cache: input that was prepared before is not tokenized again, and a run that was
stopped goes on where it was. A block is two Arrow files; the second is written last, so that its
presence says that the block is whole:

    KEY.rows     what is trained on: input_ids, supervised, and `row`, the raw row it came from
    KEY.index    one entry a raw row that can be used, with its hashes and counts; the rows that
                 can't be used, with their reasons, are in its metadata
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, cast

from tuneline.artifacts import digest_of
from tuneline.base_model import cache_dir
from tuneline.data_prep.chat import ChatFormat, Loss, Overflow, Rendered, Renderer, Tokens, fit
from tuneline.data_prep.duplicates import units, units_of_all
from tuneline.data_prep.records import (
    FORMAT_COLUMNS,
    BadRow,
    Record,
    canonical,
    opening,
    parse_line,
    parse_record,
)
from tuneline.data_prep.sources import Block
from tuneline.errors import DataError
from tuneline.recipe import Source

_CODE: Final = ("chat.py", "duplicates.py", "encode.py", "records.py")
"""Modules of this package that decide what a raw row becomes."""
_DECIDES: Final = ("jinja2", "rensa", "tokenizers", "transformers")
_ROWS_AT_ONCE: Final = 250
_SAMPLES: Final = 10
_SAMPLE_CHARACTERS: Final = 100_000
_EVERY: Final = 50
"""A sample is taken of the first rows of a block, and of every so manieth one."""
_EXAMPLES: Final = 5
_LEAST_WORDS: Final = 8
_WEIGHTLESS: Final = (
    "a turn has weight 0, and data.loss is all: take assistant or last, or remove the weight"
)
_PRELOADED: Final = [
    "jinja2",
    "numpy",
    "pyarrow",
    "rensa",
    "tokenizers",
    "transformers.utils.chat_template_utils",
    "tuneline.data_prep.duplicates",
    "tuneline.data_prep.encode",
]
"""Imported once, by the server that the workers are forked from."""
_UNREADABLE: Final = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What Arrow's values raise that Python has no value for."""
_CACHE_BYTES: Final = 20 * 10**9
_PARALLELISM: Final = "TOKENIZERS_PARALLELISM"
"""Variable that `tokenizers` reads at each call."""
_FEW_BLOCKS: Final = 16
"""Starting processes takes as long as encoding about this many blocks in them saves."""
SPLITS: Final = ("train", "validation", "test")


@dataclass(frozen=True)
class Plan:
    """All that decides what a raw row becomes, as plain values that another process can take."""

    format: ChatFormat
    source: Source
    role: str
    """`train`, `test` or `evaluation`."""
    loss: Loss
    overflow: Overflow
    max_seq_len: int
    test_fraction: float
    validation_fraction: float
    group_by: str

    def key(self) -> str:
        """Digest of everything but the rows."""
        # Llama 3.1 and others write the date into the prompt
        dated = "strftime_now" in self.format.template
        return digest_of(
            [
                code_digest(),
                date.today().isoformat() if dated else "",
                [version(package) for package in _DECIDES],
                hashlib.sha256(self.format.tokenizer.encode()).hexdigest(),
                self.format.template,
                self.format.special_tokens,
                self.format.eos_token,
                self.format.bos_token,
                self.format.controls,
                sorted(self.format.stop_ids),
                self.source.format,
                self.source.columns,
                self.role,
                self.loss,
                self.overflow,
                self.max_seq_len,
                self.test_fraction,
                self.validation_fraction,
                self.group_by,
            ]
        )


@cache
def code_digest() -> str:
    """Of the modules in `_CODE`, so that a changed one leaves no stale block."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update(files("tuneline.data_prep").joinpath(name).read_bytes())
    return digest.hexdigest()


@dataclass
class EncodedBlock:
    """A block in the cache."""

    path: Path
    block: Block
    """Its payload is dropped: the raw rows are no longer needed."""
    plan: int
    """Position of its plan."""
    made: Any = None
    """Its index where a thread of this process has just made it, for the first one that asks."""

    def index(self) -> Any:
        """The index as a pyarrow table."""
        made, self.made = self.made, None
        return made or _read(self.path.with_suffix(".index"))

    def rows(self) -> Any:
        """The rows as a pyarrow table."""
        return _read(self.path.with_suffix(".rows"))


def _read(path: Path) -> Any:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as error:
        with contextlib.suppress(OSError):
            path.with_suffix(".index").unlink()
        raise DataError(
            f"the cached block {path} went away or is damaged: run the step again, it is made anew"
        ) from error


# Of the index of a block, row by row; `turns` are supervised ones, `ends` those of them with the
# token that generation stops at.
_DTYPES: Final = {
    "row": "uint32", "content": "uint64", "opening": "uint64", "question": "uint64",
    "group": "uint64", "id": "uint64", "split": "int8", "pieces": "uint32", "tokens": "uint32",
    "supervised": "uint32", "longest": "uint32", "turns": "uint32", "ends": "uint32",
    "test_row": "string",
}  # fmt: skip


class Encoder:
    """Turns raw blocks into tokens, for one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.renderer = Renderer(plan.format, plan.loss)

    def encode(self, block: Block, path: Path) -> Any:
        """Write the block's rows and index beside `path`; returns the index."""
        faults: list[tuple[int, str, str]] = []
        counts: Counter[str] = Counter(raw_rows=len(block.too_long), too_long=len(block.too_long))
        samples: list[dict[str, Any]] = []
        entries: list[tuple[Any, ...]] = []
        words: list[list[str]] = []
        sink = _RowSink(path)
        kept: list[tuple[int, Record, Any]] = []
        for row, value in _raw_rows(block, self.plan, counts):
            counts["raw_rows"] += 1
            if isinstance(value, BadRow):
                faults.append((row, value.reason, str(value)))
                continue
            try:
                record = parse_record(value, self.plan.source)
                learned = self.plan.role != "evaluation"
                if record.weightless and learned and self.plan.loss == "all":
                    raise BadRow("unknown_key", _WEIGHTLESS)
                rendered = self.renderer.render(record)
                group = self._group(value)
            except BadRow as error:
                faults.append((row, error.reason, str(error)))
                continue
            except RecursionError:
                faults.append((row, "malformed_json", "nested too deeply"))
                continue
            counts[f"format:{record.format}"] += 1
            counts["values_left_out"] += record.values_left_out
            if self.plan.overflow == "drop" and any(
                self.renderer.too_long(r, self.plan.max_seq_len) for r in rendered
            ):
                counts["too_long"] += 1
                continue
            kept.append((row, record, (rendered, group, _identity(record.id))))
            if len(kept) == _ROWS_AT_ONCE:
                self._encode_rows(kept, entries, words, sink, counts, samples)
                kept.clear()
        self._encode_rows(kept, entries, words, sink, counts, samples)
        sink.finish()
        bad = Counter(reason for _, reason, _ in faults)
        examples = []
        for reason in bad:
            examples += [f for f in faults if f[1] == reason][:_EXAMPLES]
        metadata = {
            "counts": dict(counts),
            "bad": dict(bad),
            "examples": examples,
            "samples": samples,
            "rows_bytes": path.with_suffix(".rows").stat().st_size,
        }
        return _write_index(path, entries, words, metadata)

    def _group(self, row: dict[str, Any]) -> int:
        """Hash of what the row is grouped by; 0 for nothing."""
        if not self.plan.group_by:
            return 0
        value = row.get(self.plan.group_by)
        if value is not None:
            return _hash(json.dumps(value, sort_keys=True, default=str)) | 1
        if self.plan.role == "train":
            raise BadRow("missing_column", f"has no column '{self.plan.group_by}' to group by")
        return 0

    def _encode_rows(
        self,
        kept: list[tuple[int, Record, Any]],
        entries: list[tuple[Any, ...]],
        words: list[list[str]],
        sink: _RowSink,
        counts: Counter[str],
        samples: list[dict[str, Any]],
    ) -> None:
        plan, stops = self.plan, self.plan.format.stop_ids
        texts = [text for _, _, (rendered, _, _) in kept for text in rendered]
        encoded = iter(self.renderer.encode(texts))
        for row, record, (rendered, group, identity) in kept:
            whole = [tokens for _ in rendered for tokens in next(encoded)]
            content, opened = _hashes(record)
            split = self._split(group or opened)
            if split == "test":
                # scored by its last answer: one row, which is a test row's own
                whole = whole[-1:]
            overflow = plan.overflow
            if split == "test" and overflow == "split":
                overflow = "truncate_left"
            pieces = whole
            if too_long := sum(len(t.input_ids) > plan.max_seq_len for t in whole):
                counts["overflowed"] += too_long
                pieces = [
                    piece
                    for tokens in whole
                    for piece in fit(tokens, plan.max_seq_len, overflow, plan.format.bos_id)
                ]
            counts["turns_apart"] += len(whole) > 1
            if not pieces:
                counts["too_long"] += 1
                continue
            learnable = [piece for piece in pieces if piece.spans]
            if plan.role == "evaluation":  # only compared with
                learnable = pieces
            counts["pieces_unsupervised"] += len(pieces) - len(learnable)
            if len(pieces) > len(whole):
                counts["rows_split"] += 1
            if not learnable:
                counts["unsupervised"] += 1
                continue
            said, question = _words(record)
            words.append(said)
            lengths = [len(piece.input_ids) for piece in learnable]
            spans = [(piece, span) for piece in learnable for span in piece.spans]
            entries.append(
                (
                    row,
                    content,
                    opened,
                    question,
                    group,
                    identity,
                    SPLITS.index(split),
                    len(learnable),
                    sum(lengths),
                    sum([end - start for _, (start, end) in spans]),
                    max(lengths),
                    # a turn that is split over several pieces is one
                    sum(len(t.spans) for t in whole) if overflow == "split" else len(spans),
                    sum([piece.input_ids[end - 1] in stops for piece, (_, end) in spans]),
                    self._test_row(record, rendered[-1], len(whole[-1].input_ids))
                    if split == "test" and plan.role != "evaluation"
                    else None,
                )
            )
            counts["chats"] += bool(record.messages)
            if plan.role != "evaluation":
                for piece in learnable:
                    sink.add(row, piece)
            if plan.role == "evaluation":
                continue
            # one chat at least, for what serving renders is compared with it
            first_chat = record.messages and not any(sample["messages"] for sample in samples)
            if first_chat or (
                (len(samples) < _SAMPLES or not row % _EVERY)
                and len(rendered[-1].text) <= _SAMPLE_CHARACTERS
            ):
                samples.append(self._sample(row, record, rendered[-1], whole[-1], split))

    def _split(self, opened: int) -> str:
        if self.plan.role != "train":
            return "test"
        share = opened / 2**64
        if share < self.plan.test_fraction:
            return "test"
        held = self.plan.test_fraction + self.plan.validation_fraction
        return "validation" if share < held else "train"

    def _test_row(self, record: Record, rendered: Rendered, tokens: int) -> str:
        messages = record.messages
        if not messages:  # nothing is asked, but it has its place, and its slices
            return json.dumps({"columns": record.columns}, ensure_ascii=False)
        if self.plan.loss == "all":
            rendered = self.renderer.render(record, "last")[-1]
        question = next((m for m in reversed(messages[:-1]) if m["role"] == "user"), {})
        prompt = rendered.text[: rendered.spans[-1][0]]
        if tokens > self.plan.max_seq_len:
            prompt = self._cut_prompt(prompt, tokens)
        row = {
            "prompt": prompt,
            "question": question.get("content", ""),
            "reference": self.renderer.answer(rendered),
            "columns": record.columns,
        }
        return json.dumps(row, ensure_ascii=False)

    def _cut_prompt(self, prompt: str, tokens: int) -> str:
        """The prompt of a row of `tokens` tokens, with as much of its end as the row has room for.

        Where the answer alone fills the row, half of `max_seq_len` is for the prompt.
        """
        plan = self.plan
        encoding = self.renderer.backend.encode(prompt, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if plan.overflow == "truncate_right":  # the answer is what is cut, if it can be
            room = plan.max_seq_len - 1
        else:
            room = plan.max_seq_len - (tokens - len(ids))
            room = room if room > 0 else plan.max_seq_len // 2
        first = prompt[: offsets[0][1]] if ids and ids[0] == plan.format.bos_id else ""
        for start, _ in offsets[max(0, len(ids) - room + bool(first)) :]:
            # the text may be split into tokens differently where it now starts
            cut = first + prompt[start:]
            if len(self.renderer.backend.encode(cut, add_special_tokens=False).ids) <= room:
                return cut
        return prompt

    def _sample(
        self, row: int, record: Record, rendered: Rendered, tokens: Tokens, split: str
    ) -> dict[str, Any]:
        return {
            "row": row,
            "split": split,
            "messages": record.messages,
            "tools": record.tools,
            "text": rendered.text,
            "spans": rendered.spans,
            "input_ids": tokens.input_ids,
        }


def _raw_rows(block: Block, plan: Plan, counts: Counter[str]) -> Iterator[tuple[int, Any]]:
    if block.kind == "arrow":
        import pyarrow as pa

        table = pa.ipc.open_stream(block.payload).read_all()
        try:
            rows = table.to_pylist()
        except _UNREADABLE:
            rows = _readable_rows(table, plan, counts)
        yield from enumerate(rows)
        return
    skipped = set(block.too_long)
    for row, line in enumerate(block.payload.split(b"\n")):
        if row in skipped or not line or line.isspace():
            continue
        try:
            yield row, parse_line(line)
        except BadRow as error:
            yield row, error


def _readable_rows(table: Any, plan: Plan, counts: Counter[str]) -> list[Any]:
    """The rows of a table that has values which Python has none of, such as the year 60000.

    A row is unusable if such a value is of a column that it is made from; others are left out.
    """
    mapped = cast("Mapping[str, str]", plan.source.columns)
    needed = {mapped.get(name, name) for name in FORMAT_COLUMNS} | {plan.group_by}
    rows: list[Any] = [{} for _ in range(table.num_rows)]
    for name, column in zip(table.column_names, table.columns, strict=True):
        for number in range(len(rows)):
            try:
                value = column[number].as_py()
            except _UNREADABLE as error:
                if name not in needed:
                    counts["values_left_out"] += 1
                elif isinstance(rows[number], dict):
                    reason = "broken_text" if isinstance(error, UnicodeError) else "wrong_type"
                    rows[number] = BadRow(
                        reason, f"column {name!r} has a value that can't be read: {error}"
                    )
                continue
            if isinstance(rows[number], dict):
                rows[number][name] = value
    return rows


def _hashes(record: Record) -> tuple[int, int]:
    """64-bit hashes of the whole row, and of its opening."""
    if not record.messages:
        content = opened = _hash(record.text)
    else:
        start = len(opening(record.messages))
        state = hashlib.blake2b(digest_size=8)
        opened = 0
        for number, piece in enumerate(canonical(record.messages), 1):
            state.update(b"%d:" % len(piece))
            state.update(piece)
            if number == start:
                opened = int.from_bytes(state.copy().digest(), "big")
        if record.tools:
            state.update(json.dumps(record.tools, sort_keys=True, default=str).encode())
        content = int.from_bytes(state.digest(), "big")
    return content, opened


def _words(record: Record) -> tuple[list[str], int]:
    """What two rows are compared by: the words of all that was said but the system message.

    And a hash of the first question, whatever the system message, case and spacing; 0 where it is
    too short to be a question that one data set would have from another.
    """
    if not record.messages:
        return units(record.text), 0
    texts, asked = [], -1
    for message in record.messages:
        role = message["role"]
        if role == "system":
            continue
        if "content" in message:
            if role == "user" and asked < 0:
                asked = len(texts)
            texts.append(message["content"])
        if "tool_calls" in message:
            texts.append(json.dumps(message["tool_calls"], default=str))
    words, each = units_of_all(texts)
    if asked < 0:
        return words, 0
    question = each[asked]
    if len(question) < _LEAST_WORDS:  # unless it is without spaces
        question = units(texts[asked])
    return words, _hash(" ".join(question)) | 1 if len(question) >= _LEAST_WORDS else 0


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _identity(identity: Any) -> int:
    """Hash of a row's `id`; 0 for none."""
    if (
        isinstance(identity, float) and identity.is_integer()
    ):  # a table with a missing id has floats
        identity = int(identity)
    if not isinstance(identity, (str, int)) or identity == "":
        return 0
    return _hash(str(identity)) | 1


ROW_FIELDS: Final = (("input_ids", "int32"), ("supervised", "int8"))


def row_schema(*, with_row: bool = False) -> Any:
    """Arrow schema of what is trained on."""
    import pyarrow as pa

    fields = [(name, pa.list_(getattr(pa, kind)())) for name, kind in ROW_FIELDS]
    return pa.schema(fields + ([("row", pa.uint32())] if with_row else []))


class _RowSink:
    """Gathers the rows of one block and writes them at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".rows")
        self._ids: list[int] = []
        self._lengths: list[int] = []
        self._rows: list[int] = []
        self._spans: list[tuple[int, int]] = []

    def add(self, row: int, tokens: Tokens) -> None:
        base = len(self._ids)
        self._ids += tokens.input_ids
        self._lengths.append(len(tokens.input_ids))
        self._rows.append(row)
        self._spans += [(base + start, base + end) for start, end in tokens.spans]

    def finish(self) -> None:
        import numpy as np
        import pyarrow as pa

        ids = np.fromiter(self._ids, np.int32, len(self._ids))
        steps = np.zeros(len(ids) + 1, np.int8)
        if self._spans:
            bounds = np.asarray(self._spans, np.int64)
            np.add.at(steps, bounds[:, 0], 1)
            np.add.at(steps, bounds[:, 1], -1)
        mask = np.cumsum(steps[:-1], dtype=np.int8)
        offsets = pa.array(np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int32))
        table = pa.table(
            [
                pa.ListArray.from_arrays(offsets, pa.array(ids)),
                pa.ListArray.from_arrays(offsets, pa.array(mask)),
                pa.array(self._rows, pa.uint32()),
            ],
            schema=row_schema(with_row=True),
        )
        _write(self._path, table)


def _write_index(
    path: Path, entries: list[tuple[Any, ...]], words: list[list[str]], metadata: dict[str, Any]
) -> Any:
    import pyarrow as pa

    from tuneline.data_prep.duplicates import PERMUTATIONS, signatures

    columns = zip(*entries, strict=True) if entries else [()] * len(_DTYPES)
    arrays = {
        name: pa.array(values, getattr(pa, kind)())
        for (name, kind), values in zip(_DTYPES.items(), columns, strict=True)
    }
    flat = pa.array(signatures(words).reshape(-1))
    arrays["signature"] = pa.FixedSizeListArray.from_arrays(flat, PERMUTATIONS)
    table = pa.table(arrays).replace_schema_metadata(
        {"tuneline": json.dumps(metadata, default=str)}
    )
    _write(path.with_suffix(".index"), table)
    return table


def _write(path: Path, table: Any) -> None:
    import pyarrow as pa

    # the same rows may come in two blocks at once
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def metadata_of(index: Any) -> dict[str, Any]:
    """What a block's index says besides its rows."""
    return json.loads(index.schema.metadata[b"tuneline"])


# --- several at a time


_encoders: dict[int, Encoder] = {}


_Submit = Callable[[int, Block, Path], Future[Any]]


def _start_worker(plans: list[Plan]) -> None:
    import multiprocessing

    os.environ[_PARALLELISM] = "false"  # one process a core is parallel enough
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed run leaves no orphans

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _encoders.clear()
    _encoders.update(enumerate(map(Encoder, plans)))
    gc.collect()
    gc.freeze()
    gc.disable()  # blocks are bounded and hold no cycles


def _encode_in_worker(plan: int, block: Block, path: Path) -> None:
    _encoders[plan].encode(block, path)


def cpu_count() -> int:
    """Cores that this process may use: its affinity and, in a container, its CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores or 1, max(1, math.ceil(int(quota) / int(period))))
    return cores or 1


def encode_blocks(
    plans: list[Plan], blocks: Iterable[tuple[int, Block]], workers: int
) -> Iterator[EncodedBlock]:
    """Encode what the cache doesn't hold; yields the blocks in their order.

    Args:
        plans: one per source.
        blocks: position of the plan, and the raw rows.
        workers: at work at a time, threads of this process for few blocks, else processes.

    Raises:
        DataError: a process died.
    """
    folder = cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    keys = [plan.key() for plan in plans]
    pending: deque[tuple[EncodedBlock, Future[Any] | None]] = deque()
    iterator = iter(blocks)
    first = deque(islice(iterator, _FEW_BLOCKS + 1))
    start = _threads if len(first) <= _FEW_BLOCKS else _processes
    with contextlib.ExitStack() as stack:
        submit: _Submit | None = None
        for number, block in chain(_drained(first), iterator):
            path = folder / _block_key(keys[number], block)
            bare = Block(block.kind, b"", block.file, block.first, block.unit)
            encoded = EncodedBlock(path, bare, number)
            if _is_cached(path):
                pending.append((encoded, None))
            else:
                submit = submit or stack.enter_context(start(plans, workers))
                pending.append((encoded, submit(number, block, path)))
            while pending and (len(pending) > 2 * workers or pending[0][1] is None):
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())


def _drained(blocks: deque[tuple[int, Block]]) -> Iterator[tuple[int, Block]]:
    """Their bytes are not kept for longer than they are needed."""
    while blocks:
        yield blocks.popleft()


def _block_key(plan: str, block: Block) -> str:
    digest = hashlib.sha256(f"{plan} {block.kind} {block.too_long} ".encode())
    digest.update(block.payload)
    return digest.hexdigest()


def _is_cached(path: Path) -> bool:
    rows, index = path.with_suffix(".rows"), path.with_suffix(".index")
    import pyarrow as pa

    try:
        with pa.OSFile(str(index)) as file:
            metadata = json.loads(pa.ipc.open_file(file).schema.metadata[b"tuneline"])
        if metadata["rows_bytes"] != rows.stat().st_size:
            return False
        os.utime(index)  # what is used is not pruned
        return True
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _threads(plans: list[Plan], workers: int) -> Iterator[_Submit]:
    """Three quarters of the time is spent in the tokenizer, which lets other threads work."""
    own = threading.local()  # a renderer has one text at a time

    def encode(plan: int, block: Block, path: Path) -> Any:
        encoders = own.__dict__.setdefault("encoders", {})
        if plan not in encoders:
            encoders[plan] = Encoder(plans[plan])
        return encoders[plan].encode(block, path)

    collects, parallel = gc.isenabled(), os.environ.get(_PARALLELISM)
    gc.disable()  # few blocks, without cycles; a collection would walk all rows of a block
    os.environ[_PARALLELISM] = "false"  # one thread a core is parallel enough
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield partial(pool.submit, encode)
        finally:
            pool.shutdown(cancel_futures=True)
            os.environ.pop(_PARALLELISM, None)
            if parallel is not None:
                os.environ[_PARALLELISM] = parallel
            if collects:
                gc.enable()


@contextlib.contextmanager
def _processes(plans: list[Plan], workers: int) -> Iterator[_Submit]:
    import multiprocessing

    context = multiprocessing.get_context("forkserver")  # fork would copy threads that hold locks
    context.set_forkserver_preload(_PRELOADED)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (plans,))
    try:
        yield partial(pool.submit, _encode_in_worker)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(encoded: EncodedBlock, future: Future[Any] | None) -> EncodedBlock:
    if future is not None:
        try:
            encoded.made = future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a process that tokenized {encoded.block.where(0)} and the rows after it died, "
                "most likely for want of memory: give the step more memory or fewer cores and run "
                "it again; the blocks that were done are kept"
            ) from error
    return encoded


def prune_cache(limit_bytes: int = _CACHE_BYTES) -> None:
    """Remove the blocks that were not used for longest, beyond the limit."""
    folder = cache_dir() / "tokens"
    entries = []
    for index in folder.glob("*.index"):
        with contextlib.suppress(OSError):
            status = index.stat()
            rows = index.with_suffix(".rows")
            entries.append((status.st_mtime, status.st_size + rows.stat().st_size, index, rows))
    total = sum(size for _, size, _, _ in entries)
    for _, size, index, rows in sorted(entries):
        if total <= limit_bytes:
            return
        for path in (index, rows):
            path.unlink(missing_ok=True)
        total -= size
