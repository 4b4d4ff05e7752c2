"""Valid files, damaged at random: each is refused in a sentence, or every row of it is counted."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneline.data_prep.prepare import CONTRACT, PAGE, prepare
from tuneline.errors import TunelineError
from tuneline.recipe import DataSection

Rows = list[dict[str, Any]]
SEEDS = 14

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [1.5, None]}}}


def rows_of(draw: random.Random) -> Rows:
    """Good rows of one format, with columns beside it."""
    name = draw.choice(("messages", "calls", "sharegpt", "alpaca", "pairs", "text"))
    made: Rows = []
    for n in range(12):
        question, answer = f"what is {n} and {n * n}?", f"it is é{n}, or 中文 {n}"
        row: dict[str, Any] = {"id": n, "topic": f"t{n % 3}", "score": n / 3, "more": {"a": [n]}}
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if name == "messages":
            row["messages"] = turns
        elif name == "calls":
            row["messages"] = [
                turns[0],
                {"role": "assistant", "content": "one moment", "tool_calls": [CALL]},
                {"role": "tool", "content": f'{{"sum": {n}}}'},
                turns[1],
            ]
            row["tools"] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
        elif name == "sharegpt":
            speakers = zip(("human", "gpt"), (question, answer), strict=True)
            row["conversations"] = [{"from": who, "value": what} for who, what in speakers]
        elif name == "alpaca":
            row |= {
                "instruction": question,
                "input": str(n),
                "output": answer,
                "history": [["h", "k"]],
            }
        elif name == "pairs":
            row |= {"prompt": question, "completion": answer, "system": "be kind"}
        else:
            row["text"] = f"{question} {answer}"
        made.append(row)
    return made


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


ODD: list[Any] = [
    None, 0, -1, True, 1.5, float("nan"), float("inf"), 10**30, "", " ", "\0", "\ud800", "\u200b",
    "x" * 50_000, [], {}, [None], {"a": {"b": 1}}, deep(20), deep(90), deep(600), "[{",
    '{"a": NaN}', "<|im_end|>", "null", "[]", b"\xff", datetime(2026, 1, 1, tzinfo=UTC),
]  # fmt: skip


def places(value: Any, levels: int = 8) -> list[tuple[Any, Any]]:
    """Every container of a value, with each of its keys."""
    keys: Any = ()
    if isinstance(value, (dict, list)) and levels:
        keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key], levels - 1)]


def disturb(rows: Rows, draw: random.Random) -> None:
    """Swap types, delete and rename keys, in some rows or in all."""
    some = rows if draw.random() < 0.4 else draw.sample(rows, draw.randint(1, 4))
    which, odd, kind = draw.randrange(1000), draw.choice(ODD), draw.randrange(4)
    for row in some:
        container, key = (found := places(row))[which % len(found)]
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[f"{key}\0{'z' * draw.choice((1, 3000))}"] = container.pop(key)
        else:
            container[key] = odd


def damage(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert and repeat bytes."""
    changed = bytearray(data)
    start = draw.randrange(len(changed))
    length = draw.choice((1, 3, 50, 4000))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        changed[start:start] = b"\0" * length
    elif kind == 3:
        del changed[start : start + length]
    elif kind == 4:
        changed[start:start] = changed[start : start + length]
    else:
        changed[start:start] = draw.choice((b"[", b'{"', b'"', b"\n", b"\xff\xfe", b",")) * length
    return bytes(changed)


def as_lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows)


def as_array(rows: Rows) -> bytes:
    return json.dumps(rows, default=str, indent=1).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        cells = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in row.items()}
        writer.writerow(cells)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_table(rows: Rows) -> bytes:
    """Each column of its type, or JSON text if it has several; and one that Python can't hold."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
            pq.write_table(
                pa.table({name: columns[name]}), io.BytesIO()
            )  # no struct without fields
        except (pa.ArrowException, ArithmeticError, RuntimeError, TypeError, UnicodeError):
            columns[name] = pa.array([json.dumps(value, default=str) for value in values])
    years = pa.array([0, 2**62, None] * len(rows), pa.int64())[: len(rows)]
    columns["at"] = years.cast(pa.timestamp("us", "No/Where"))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=5)
    return sink.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": as_lines, ".json": as_array, ".csv": as_csv, ".parquet": as_table,
}  # fmt: skip
SQUEEZE: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
DROPS = (
    "bad_rows_dropped", "too_long_dropped", "unsupervised_dropped", "duplicates_dropped",
    "near_duplicates_dropped", "in_test_dropped", "leaking_dropped", "not_sampled",
)  # fmt: skip
ANYTHING_GOES = {
    "max_bad_fraction": 1, "max_too_long_fraction": 1, "max_duplicate_fraction": 1,
    "max_repeated_id_fraction": 1, "max_unsupervised_fraction": 1, "min_eos_fraction": 0,
    "min_supervised_token_fraction": 0,
}  # fmt: skip


def damaged(form: str, compression: str, draw: random.Random) -> bytes:
    """A file that may have been damaged as rows, as text, and as what is on the disk."""
    rows = json.loads(json.dumps(rows_of(draw)))
    where = draw.choice(("rows", "rows", "text", "disk"))
    if where == "rows":
        for _ in range(draw.randint(1, 3)):
            disturb(rows, draw)
    data = WRITERS[form](rows)
    data = SQUEEZE[compression](damage(data, draw) if where == "text" else data)
    return damage(data, draw) if where == "disk" else data


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("compression", SQUEEZE)
@pytest.mark.parametrize("form", WRITERS)
def test_a_damaged_file_is_refused_in_a_sentence_or_counted_row_by_row(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    compression: str,
    seed: int,
) -> None:
    monkeypatch.setattr("tuneline.data_prep.prepare.cpu_count", lambda: 1)  # no processes to start
    path = tmp_path / f"rows{form}{compression}"
    path.write_bytes(damaged(form, compression, random.Random(f"{form}{compression}{seed}")))
    good = tmp_path / "good.jsonl"
    good.write_bytes(as_lines([{"prompt": f"{n}?", "completion": "no"} for n in range(3)]))
    data = DataSection.model_validate(
        {
            "train": str(path if seed % 3 else good),
            "test": str(good if seed % 3 else path),
            "validation_fraction": 0,
            "contract": ANYTHING_GOES,
        }
    )
    place = tmp_path / "out"
    try:
        prepare(str(tiny_model), data, place)
    except TunelineError as error:
        sentence, *examples = str(error).split("\n  - ")
        assert "\n" not in sentence and len(sentence) < 1500
        assert all("\n" not in example and len(example) < 800 for example in examples)
        assert not place.exists()
        place = tmp_path / "out.refused"
        if not place.exists():  # the file as such is at fault
            assert str(path) in sentence
            return
    text = (place / CONTRACT).read_text()
    contract = json.loads(text, parse_constant=pytest.fail)
    assert contract["rows_in"] == contract["rows_out"] + sum(contract[name] for name in DROPS)
    assert contract["bad_rows_dropped"] == sum(contract["bad_rows"].values())
    assert len(text) < 1_000_000 and (place / PAGE).stat().st_size < 1_000_000
    for line in (place / "test_rows.jsonl").open() if place.name == "out" else ():
        json.loads(line, parse_constant=pytest.fail)
