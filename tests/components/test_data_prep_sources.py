"""Every source, format and fault: rows come through, are counted, or one sentence says why."""

import bz2
import csv
import gzip
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneline.artifacts import digest_of_file
from tuneline.data_prep import chat, sources
from tuneline.data_prep.encode import encode_blocks, metadata_of
from tuneline.data_prep.prepare import _plans
from tuneline.data_prep.records import BadRow, parse_record
from tuneline.data_prep.sources import read_blocks
from tuneline.errors import DataError
from tuneline.recipe import DataSection, Source

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(GOOD).encode() + b"\n"


@pytest.fixture(scope="module")
def chats_of_tiny(tiny_model: Path) -> chat.ChatFormat:
    return chat.chat_format(chat.load_tokenizer(str(tiny_model)), tiny_model)


class Outcome:
    """What became of a source's rows."""

    def __init__(self, formats: chat.ChatFormat, source: Source | str, **data: Any) -> None:
        section = DataSection.model_validate({"train": [source], **data})
        plans = _plans(section, formats)
        self.digests: dict[str, str] = {}
        self.kept = 0
        self.bad: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.sentences: list[str] = []
        blocks = ((0, block) for block in read_blocks(plans[0].source, self.digests))
        for encoded in encode_blocks(plans, blocks, 1):
            index = encoded.index()
            metadata = metadata_of(index)
            self.kept += index.num_rows
            self.bad.update(metadata["bad"])
            self.counts.update(metadata["counts"])
            self.sentences += [
                f"{encoded.block.where(row)}: {sentence}"
                for row, _, sentence in metadata["examples"]
            ]
        lost = self.bad.total() + self.counts["too_long"] + self.counts["unsupervised"]
        assert self.kept + lost == self.counts["raw_rows"], "a row went missing without a count"


Prepare = Callable[..., Outcome]


@pytest.fixture
def outcome(chats_of_tiny: chat.ChatFormat) -> Prepare:
    return lambda source, **data: Outcome(chats_of_tiny, source, **data)


def table_of(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def csv_of(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PAIRS = [{"prompt": f'what is {n}, "said"\nhe', "completion": f"it is é{n}"} for n in range(7)]
FILES = {
    "rows.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in PAIRS),
    "rows.ndjson": b"\n\n".join(json.dumps(row).encode() for row in PAIRS),
    "rows.json": json.dumps(PAIRS, indent=1).encode(),
    "lines.json": b"".join(json.dumps(row).encode() + b"\n" for row in PAIRS),
    "rows.csv": csv_of(PAIRS),
    "rows.parquet": table_of(PAIRS),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_file_format_gives_the_same_rows(
    outcome: Prepare, tmp_path: Path, name: str, compression: str
) -> None:
    squeeze: dict[str, Callable[[bytes], bytes]] = {
        "": bytes, ".gz": gzip.compress, ".zst": zstd,
    }  # fmt: skip
    path = tmp_path / (name + compression)
    path.write_bytes(squeeze[compression](FILES[name]))
    result = outcome(str(path))
    assert (result.kept, result.bad) == (7, Counter())
    assert result.digests == {str(path): f"sha256:{digest_of_file(path)}"}


def test_a_folder_and_a_glob_are_all_their_files(outcome: Prepare, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(LINE * 2))
    (tmp_path / "README.md").write_text("no rows")
    assert outcome(str(tmp_path)).kept == 3
    assert outcome(str(tmp_path / "*.jsonl")).kept == 1
    assert len(outcome(str(tmp_path / "**/*.jsonl*")).digests) == 2


def test_google_storage_is_read_through_fsspec(
    outcome: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry  # what is registered in public can't be taken back

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store: dict[str, Any] = {}  # noqa: RUF012  as fsspec declares it
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("gs://"))

    monkeypatch.setitem(_registry, "gs", Bucket)
    system = Bucket()
    for name in ("a", "b"):
        with system.open(f"bucket/{name}.jsonl.gz", "wb") as file:
            file.write(gzip.compress(LINE * 3))
    assert outcome("gs://bucket/a.jsonl.gz").kept == 3
    result = outcome("gs://bucket/*.jsonl.gz")
    assert result.kept == 6
    assert sorted(result.digests) == ["gs://bucket/a.jsonl.gz", "gs://bucket/b.jsonl.gz"]
    with pytest.raises(DataError, match=r"gs://bucket/c\.jsonl can't be read"):
        outcome("gs://bucket/c.jsonl")


def test_a_bucket_without_its_package_says_what_to_install(outcome: Prepare) -> None:
    with pytest.raises(DataError, match=r"gs:// needs gcsfs \(pip install 'tuneline\[gcs\]'\)"):
        outcome("gs://bucket/a.jsonl")


def test_a_hub_data_set_that_cannot_be_had_is_one_sentence(outcome: Prepare) -> None:
    with pytest.raises(
        DataError, match=r"org/none: the hub does not say which commit that is: \w+"
    ):
        outcome({"path": "hf://org/none", "config": "c", "split": "test"})
    with pytest.raises(DataError, match="not of the form"):
        outcome("hf://none")


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        (GOOD | {"prompt": "also there"}, "messages", [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "developer", "content": "s"}, *GOOD["messages"]]},
            "messages",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": json.dumps(GOOD["messages"])},
            "messages",
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          GOOD["messages"][1] | {"tool_calls": None, "name": None, "weight": 1}]},
            "messages",
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                               {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (  # as SlimOrca has it
            {"conversations": [{"from": "system", "value": "s", "weight": None},
                               {"from": "human", "value": "q", "weight": 0.0},
                               {"from": "gpt", "value": "a", "weight": 1.0}]},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"},
                                              {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca",
         [("user", "i"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": "x", "output": "o", "history": [["h", "k"]]},
            "alpaca",
            [("user", "h"), ("assistant", "k"), ("user", "i\n\nx"), ("assistant", "o")],
        ),
        ({"prompt": "p", "completion": "c", "system": "s"}, "prompt_completion",
         [("system", "s"), ("user", "p"), ("assistant", "c")]),
        (
            {"prompt": [{"role": "user", "content": "p"}],
             "completion": [{"role": "assistant", "content": "c"}]},
            "prompt_completion",
            [("user", "p"), ("assistant", "c")],
        ),
        ({"text": "just text"}, "text", []),
    ],
)  # fmt: skip
def test_the_format_is_detected(
    row: dict[str, Any], name: str, messages: list[tuple[str, str]]
) -> None:
    record = parse_record(row, Source(path="x"))
    assert record.format == name
    assert [(m["role"], m["content"]) for m in record.messages] == messages
    assert all(set(m) == {"role", "content"} for m in record.messages)


def test_tool_calls_are_kept_with_arguments_as_objects() -> None:
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "r", "tool_call_id": "c1"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
        },
        Source(path="x"),
    )
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert record.messages[2]["tool_call_id"] == "c1"
    assert record.tools == [{"type": "function", "function": {"name": "f"}}]


def test_columns_are_mapped_and_the_rest_stays_for_slices() -> None:
    source = Source(path="x", columns={"prompt": "question", "completion": "answer"})
    row = {"question": "q", "answer": "a", "topic": "maths", "level": 3, "long": "x" * 300}
    record = parse_record(row, source)
    assert [m["content"] for m in record.messages] == ["q", "a"]
    assert record.columns == {"topic": "maths", "level": 3}


def test_what_json_has_no_number_for_is_left_out_of_the_columns_and_counted() -> None:
    row = json.loads('{"prompt": "p", "completion": "c", "a": NaN, "b": 1e999, "c": 0.5}')
    record = parse_record(row, Source(path="x"))
    assert record.columns == {"c": 0.5} and record.values_left_out == 2


def test_the_sentence_of_a_bad_row_is_short_and_says_what_is_allowed() -> None:
    row = {"messages": [{"role": "x" * 3_000_000, "content": "c"}]}
    with pytest.raises(BadRow) as caught:
        parse_record(row, Source(path="x"))
    sentence = str(caught.value)
    assert len(sentence) < 500
    assert sentence.startswith("message 1: role 'xxx") and sentence.endswith("assistant, tool")


def message(**values: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, values]}).encode() + b"\n"


def chat_of(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": r} for r in roles]}).encode() + b"\n"


def row(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


BAD_ROWS = {  # line -> reason, part of the sentence; each is counted beside good rows
    "cut json": (b'{"messages": [\n', "malformed_json", "malformed JSON"),
    "no json": (b"{oops}\n", "malformed_json", "malformed JSON"),
    "deep": (b"[" * 100_000 + b"\n", "malformed_json", "malformed JSON"),
    "nan": (b"NaN\n", "not_an_object", "is float"),
    "broken utf-8": (b'{"text": "\xff\xfe"}\n', "not_utf8", "not UTF-8"),
    "utf-8 cut in a character": (b'{"text": "\xc3"}\n', "not_utf8", "not UTF-8"),
    "list": (b"[1]\n", "not_an_object", "is list"),
    "string": (b'"text"\n', "not_an_object", "is str"),
    "null": (b"null\n", "not_an_object", "is null"),
    "empty object": (b"{}\n", "unknown_format", "no known format"),
    "unknown columns": (row(question="q", answer="a"), "unknown_format", "question, answer"),
    "preferences": (row(prompt="p", chosen="c", rejected="r"), "unknown_format", "preference"),
    "null column": (row(prompt="p", completion=None), "empty", "completion is null"),
    "all null": (row(messages=None, text=None), "empty", "messages is null"),
    "prompt only": (row(prompt="x"), "unknown_format", "no known format"),
    "empty messages": (row(messages=[]), "empty", "an empty list"),
    "messages of text": (row(messages=["x"]), "wrong_type", "message 1: is str"),
    "messages as broken text": (row(messages="[{"), "malformed_json", "text that is not JSON"),
    "messages as object": (row(messages={"role": "user"}), "empty", "messages is dict"),
    "unknown role": (message(role="robot", content="x"), "unknown_role", "role 'robot'"),
    "no role": (message(content="x"), "unknown_role", "role None"),
    "role as list": (message(role=["user"], content="x"), "unknown_role", "is unknown"),
    "null content": (message(role="assistant", content=None), "wrong_type", "content is null"),
    "object content": (message(role="assistant", content={"a": 1}), "wrong_type", "is dict"),
    "number content": (message(role="assistant", content=5), "wrong_type", "content is int"),
    "blank answer": (message(role="assistant", content="  "), "empty_turn", "answer is empty"),
    "blank question": (
        row(messages=[{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]),
        "empty_turn", "user's message is empty",
    ),
    "image part": (
        message(role="assistant", content=[{"type": "image_url"}]), "wrong_type", "'image_url'",
    ),
    "no call and no answer": (
        message(role="assistant", content="", tool_calls="[]"), "empty_turn", "answer is empty",
    ),
    "calls of a wrong type": (
        message(role="assistant", content="x", tool_calls=0), "wrong_type", "tool_calls is int",
    ),
    "answer without a width": (
        message(role="assistant", content="\ufeff \u200b\n"), "empty_turn", "answer is empty",
    ),
    "completion without a width": (
        row(prompt="p", completion="\u200b"), "empty_turn", "completion is empty",
    ),
    "repeated key": (
        LINE.replace(b'{"role": "user"', b'{"role": "system", "role": "user"'),
        "malformed_json", "key 'role' is there more than once",
    ),
    "repeated key in a column of text": (
        row(messages='[{"role": "user", "role": "user", "content": "q"}]'),
        "malformed_json", "key 'role' is there more than once",
    ),
    "turn with weight": (
        row(conversations=[{"from": "human", "value": "q"},
                           {"from": "gpt", "value": "a", "weight": 0}]),
        "unknown_key", "turn 2: keys weight are not supported; keys are from, value",
    ),
    "images beside the text": (
        json.dumps(GOOD | {"images": ["a.png"]}).encode() + b"\n", "wrong_type", "has images",
    ),
    "audio beside the text": (
        row(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            audio="a.wav"),
        "wrong_type", "has audio",
    ),
    "infinite number in a call": (
        message(role="assistant", tool_calls=[{"name": "f", "arguments": {"x": 1e999}}]),
        "wrong_type", "a tool call has NaN or an infinite number",
    ),
    "call as deep as no person writes": (
        message(role="assistant", tool_calls='[{"name": "f", "arguments": {"x": '
                + "[" * 300 + "]" * 300 + "}}]"),
        "wrong_type", "more than 100 levels",
    ),
    "tools of a wrong type": (
        json.dumps(GOOD | {"tools": 0}).encode() + b"\n", "wrong_type", "tools must be a list",
    ),
    "alpaca input of a number": (
        row(instruction="i", input=0, output="o"), "wrong_type", "input is int",
    ),
    "alpaca input of a list": (
        row(instruction="i", input=[], output="o"), "wrong_type", "input is an empty list",
    ),
    "alpaca history of a number": (
        row(instruction="i", history=0, output="o"), "wrong_type", "history is int",
    ),
    "weight": (message(role="assistant", content="x", weight=0), "unknown_key", "keys weight"),
    "half a character": (
        message(role="assistant", content="\ud800"), "broken_text", "half a character",
    ),
    "nul": (message(role="assistant", content="a\0b"), "broken_text", r"'\\x00'"),
    "escape": (message(role="assistant", content="\x1b[2J"), "broken_text", "control character"),
    "ends with user": (chat_of("user", "assistant", "user"), "no_answer", "no answer"),
    "only system": (chat_of("system"), "no_answer", "no answer"),
    "user twice": (chat_of("user", "user", "assistant"), "roles_out_of_order", "user after user"),
    "answer twice": (
        chat_of("user", "assistant", "assistant"), "roles_out_of_order", "assistant after",
    ),
    "late system": (chat_of("user", "system", "assistant"), "roles_out_of_order", "system after"),
    "tool first": (chat_of("tool", "assistant"), "roles_out_of_order", "tool after nothing"),
    "call of a user": (
        row(messages=[{"role": "user", "tool_calls": [CALL]}, *GOOD["messages"]]),
        "wrong_type", "tool_calls of role user",
    ),
    "call without name": (
        message(role="assistant", tool_calls=[{"function": {}}]), "wrong_type", "function's name",
    ),
    "call with broken arguments": (
        message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "malformed_json", "arguments is text that is not JSON",
    ),
    "call with a list": (
        message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        "wrong_type", "arguments are list",
    ),
    "tools as text": (json.dumps(GOOD | {"tools": "x"}).encode() + b"\n", "malformed_json", "JSON"),
    "tools unrendered": (
        json.dumps(GOOD | {"tools": [{"name": "f"}]}).encode() + b"\n",
        "template_error", "does not render tools",
    ),
    "unknown speaker": (
        row(conversations=[{"from": "alien", "value": "x"}]), "unknown_role", "from 'alien'",
    ),
    "sharegpt null": (
        row(conversations=[{"from": "human", "value": None}]), "wrong_type", "content is null",
    ),
    "sharegpt text": (row(conversations="hello"), "malformed_json", "not JSON"),
    "sharegpt of lists": (row(conversations=[["human", "x"]]), "wrong_type", "turn 1 is list"),
    "alpaca object": (
        row(instruction={"a": 1}, output="x"), "wrong_type", "instruction is dict",
    ),
    "alpaca blank": (row(instruction="i", output=" "), "empty_turn", "output is empty"),
    "alpaca history": (
        row(instruction="i", output="o", history=[["a"]]), "wrong_type", "must hold pairs",
    ),
    "prompt list": (row(prompt="p", completion=["c"]), "wrong_type", "completion is list"),
    "blank text": (row(text=" \n"), "empty", "text is empty"),
    "nested text": (row(text={"a": ["b"]}), "wrong_type", "text is dict"),
    "half a character in a column's name": (
        b'{"\\ud800": 1}\n', "unknown_format", "columns \\ud800",
    ),
    "half a character in a tool": (
        json.dumps(GOOD | {"tools": [{"name": "\ud800"}]}).encode() + b"\n",
        "broken_text", "tools has half a character",
    ),
    "reasoning unrendered": (
        message(role="assistant", content="a", reasoning_content="because"),
        "template_error", "does not render reasoning_content",
    ),
    "control token": (
        message(role="assistant", content="a<|im_end|>\n<|im_start|>user"),
        "control_token", "control token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_counted_and_named_by_file_and_line(
    outcome: Prepare, tmp_path: Path, name: str
) -> None:
    line, reason, sentence = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + line + LINE)
    result = outcome(str(path))
    assert result.kept == 2
    assert dict(result.bad) == {reason: 1}
    assert result.sentences[0].startswith(f"{path} line 2: ")
    assert sentence.replace("\\\\", "\\") in result.sentences[0]


def broken_gzip() -> bytes:
    return gzip.compress(LINE * 5000)[:-20]


def broken_zstd() -> bytes:
    return zstd(LINE * 5000)[:-20]


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../../evil.jsonl", LINE)
    return sink.getvalue()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {  # file name, content, part of the error
    "empty": ("a.jsonl", b"", "is empty"),
    "blank lines": ("a.jsonl", b"\n \n", "is empty"),
    "utf-16": ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16"),
    "cut gzip": ("a.jsonl.gz", broken_gzip(), "cut short"),
    "no gzip": ("a.jsonl.gz", LINE, "is not a .gz file"),
    "damaged gzip": ("a.jsonl.gz", gzip.compress(LINE)[:-8] + b"\0" * 8, "is not a .gz file"),
    "empty gzip": ("a.jsonl.gz", b"", "is empty"),
    "cut zstd": ("a.jsonl.zst", broken_zstd(), "damaged or cut short"),
    "no zstd": ("a.jsonl.zst", LINE, "damaged or cut short"),
    "zip": ("a.zip", zipped(), "ends in none of"),
    "zip under another name": ("a.csv", zipped(), "holds a zip archive"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(LINE), "ends in none of"),
    "unknown suffix": ("a.txt", LINE, "ends in none of"),
    "json cut short": ("a.json", b'[{"text": "a"}, {"te', "malformed JSON"),
    "json with a trailing comma": ("a.json", b'[{"text": "a"}, ]', "malformed JSON"),
    "json with more behind": ("a.json", b'[{"text": "a"}] x', "more after the array"),
    "json without commas": ("a.json", b'[{"text": "a"} {"text": "b"}]', "expecting ','"),
    "json of nothing": ("a.json", b"[]", "is empty"),
    "json of deep lists": ("a.json", b"[" * 100_000, "malformed JSON"),
    "json with broken utf-8": ("a.json", b'[{"text": "\xff"}]', "is not UTF-8"),
    "csv with a stray quote": ("a.csv", b'prompt,completion\na,"b"c\n', "malformed CSV"),
    "csv with an open quote": ("a.csv", b'prompt,completion\na,"b\nc,d\n', "malformed CSV"),
    "csv with a field too many": ("a.csv", b"prompt,completion\na,b,c\n", "3 fields"),
    "csv with a field too few": ("a.csv", b"prompt,completion\na\n", "1 fields"),
    "csv header alone": ("a.csv", b"prompt,completion\n", "is empty"),
    "csv with a repeated column": ("a.csv", b"a,a\n1,2\n", "repeated names"),
    "csv in utf-16": ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "UTF-16"),
    "json in utf-16": ("a.json", json.dumps(PAIRS).encode("utf-16"), "UTF-16"),
    "json of gzipped nothing": ("a.json.gz", gzip.compress(b""), "is empty"),
    "gzip in gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(LINE)), "holds gzip data"),
    "gzip under another name": ("a.jsonl", gzip.compress(LINE), "holds gzip data"),
    "parquet under another name": ("a.jsonl", table_of(PAIRS), "holds a Parquet table"),
    "zip named gz": ("a.jsonl.gz", zipped(), "is not a .gz file"),
    "csv in latin-1": ("a.csv", "prompt,completion\né,b\n".encode("latin-1"), "not UTF-8"),
    "csv with an endless field": (
        "a.csv", b"prompt,completion\na," + b"x" * 5_000_000 + b"\n", "malformed CSV",
    ),
    "parquet cut short": ("a.parquet", table_of(PAIRS)[:-30], "no Parquet file"),
    "parquet of text": ("a.parquet", LINE, "no Parquet file"),
    "parquet damaged": (
        "a.parquet", b"PAR1" + b"\0" * 60 + table_of(PAIRS)[64:], "damaged or no Parquet",
    ),
    "parquet of nothing": (
        "a.parquet", table_of([{"text": "x"}])[:0] + table_of([]), "is empty",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_error_that_names_it(outcome: Prepare, tmp_path: Path, name: str) -> None:
    file, content, sentence = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        outcome(str(path))
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere.jsonl", "nowhere.jsonl can't be read (No such file"),
        ("no-*.jsonl", "no file matches"),
        ("a\0b.jsonl", "can't be read (embedded null byte"),
        ("/dev/null", "not a regular file"),
        ("/proc/self/mem", "can't be read"),
        ("ftp://host/a.jsonl", "scheme 'ftp://' is unknown"),
        ("file:///etc/passwd", "scheme 'file://' is unknown"),
        ("~nobody-at-all/x.jsonl", "can't be read"),
        ("x" * 5000 + ".jsonl", "can't be read"),
        ("demo:tset", "can't be read"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_error(outcome: Prepare, path: str, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        outcome(path)
    assert sentence in str(caught.value) and "hf://" in str(caught.value)


def test_a_row_of_ten_megabytes_is_dropped_as_too_long_and_counted(
    outcome: Prepare, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + row(text="x" * 10_000_000) + row(text="y" * 1_000_000) + LINE)
    result = outcome(str(path))
    assert result.kept == 2 and result.counts["too_long"] == 2 and not result.bad
    for name in ("rows.json", "rows.parquet"):
        other = tmp_path / name
        rows = [{"text": "ok"}, {"text": "x" * 10_000_000}]
        other.write_bytes(table_of(rows) if "parquet" in name else json.dumps(rows).encode())
        result = outcome(str(other))
        assert (result.kept, result.counts["too_long"]) == (1, 1)


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_table_s_blocks_are_bounded_and_its_long_rows_dropped_as_those_of_lines_are(
    outcome: Prepare, tmp_path: Path, dictionary: bool
) -> None:
    texts = ["x" * 6_500_000 if n == 333 else f"{n} " + "y" * 30_000 for n in range(500)]
    column = pa.array(texts)
    table = pa.table({"text": column.dictionary_encode() if dictionary else column})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    blocks = list(read_blocks(Source(path=str(path)), {}))
    assert max(len(block.payload) for block in blocks) < sources.BLOCK_BYTES
    (long,) = [block for block in blocks if block.too_long]
    assert long.where(long.too_long[0]) == f"{path} row 334"
    assert sum(pa.ipc.open_stream(b.payload).read_all().num_rows for b in blocks) == 499
    rows = [{"text": "ok"}, {"text": "x" * 6_500_000}]
    path.write_bytes(table_of(rows))
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(row(**rows[0]) + row(**rows[1]))
    for name in (path, lines):
        result = outcome(str(name), max_seq_len=1_000_000)
        assert (result.kept, result.counts["too_long"]) == (1, 1)


def test_a_local_table_is_read_where_it_is(
    outcome: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(table_of(PAIRS))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    result = outcome(str(path))
    assert result.kept == 7
    assert result.digests == {str(path): f"sha256:{digest_of_file(path)}"}


def unreadable(kind: str, count: int) -> pa.Array:
    """Values that Parquet can hold and Python can't, but the first."""
    if kind == "utf-8":
        values = pa.array([b"fine", *[b"\xff\xfe"] * (count - 1)], pa.binary())
        return pa.Array.from_buffers(pa.string(), count, values.buffers())
    zone = "No/Where" if kind == "time zone" else None
    return pa.array([None, *[2**62] * (count - 1)], pa.int64()).cast(pa.timestamp("us", zone))


@pytest.mark.parametrize("kind", ["utf-8", "year", "time zone"])
def test_values_of_a_table_that_cannot_be_read_are_counted(
    outcome: Prepare, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "rows.parquet"
    column = unreadable(kind, 3)
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]})
    pq.write_table(table.append_column("at", column), path)
    beside = outcome(str(path))
    assert (beside.kept, beside.counts["values_left_out"]) == (3, 2)
    pq.write_table(table.append_column("system", column), path)
    used = outcome(str(path))
    reason = "broken_text" if kind == "utf-8" else "wrong_type"
    assert (used.kept, dict(used.bad)) == (1, {reason: 2})
    assert "column 'system' has a value that can't be read" in used.sentences[0]


def test_a_table_with_a_repeated_column_is_refused(outcome: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(DataError, match="repeated names"):
        outcome(str(path))


def test_a_repeated_key_in_an_array_is_counted(outcome: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a",\n "text": "b"},\n {"text":\n "c\\n"}]')
    result = outcome(str(path))
    assert (result.kept, dict(result.bad)) == (1, {"malformed_json": 1})


def test_a_file_without_a_line_break_is_not_read_into_memory(
    outcome: Prepare, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    result = outcome(str(path))
    assert result.kept == 0 and result.counts["too_long"] == 1


def test_rows_of_wrong_types_in_a_table_are_counted(outcome: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {
            "prompt": pa.array(["a", None, "c", "d"]),
            "completion": pa.array([b"\xff", b"x", None, b"y"], pa.binary()),
        }
    )
    pq.write_table(table, path)
    result = outcome(str(path))
    assert result.kept == 0
    assert dict(result.bad) == {"wrong_type": 2, "empty": 2}
    assert "completion is bytes" in result.sentences[0]


def test_a_mapped_column_that_is_missing_names_the_ones_that_are_there(
    outcome: Prepare, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row(question="q", answer="a"))
    result = outcome({"path": str(path), "columns": {"prompt": "query", "completion": "answer"}})
    assert dict(result.bad) == {"missing_column": 1}
    assert "'query'" in result.sentences[0] and "question, answer" in result.sentences[0]


def test_odd_names_of_columns_and_files_are_carried_through(
    outcome: Prepare, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / os.fsdecode(b"rows-\xff.jsonl")
    path.parent.mkdir()
    path.write_bytes(LINE[:-2] + b', "\\ud800": 1, "\\u0000": 2}\n' + b"oops\n")
    result = outcome(str(path.parent))
    assert result.kept == 1
    json.dumps([result.sentences, result.digests], ensure_ascii=False).encode()


def test_a_nul_and_an_empty_cell_of_a_table_are_counted(outcome: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\na\0,b\nc,d\n,e\n")
    result = outcome(str(path))
    assert result.kept == 1
    assert dict(result.bad) == {"broken_text": 1, "empty": 1}


def test_dates_and_numbers_of_a_table_are_no_traceback(outcome: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    calls = [{"name": "f", "arguments": {"at": datetime(2026, 1, 2)}}]
    rows = [
        {"at": datetime(2026, 1, 1), "messages": [GOOD["messages"][0], {"role": "assistant",
         "tool_calls": calls}]},
        {"at": None, "messages": GOOD["messages"]},
    ]  # fmt: skip
    path.write_bytes(table_of(rows))
    result = outcome(str(path), group_by="at")
    assert dict(result.bad) == {"template_error": 1, "missing_column": 1}


def test_dates_in_a_call_that_the_template_renders_are_no_traceback(
    chats_of_tiny: chat.ChatFormat, tmp_path: Path
) -> None:
    content = "{{ message['content'] }}"
    template = chats_of_tiny.template.replace(content, content + "{{ message.tool_calls }}")
    path = tmp_path / "rows.parquet"
    calls = [{"name": "f", "arguments": {"at": datetime(2026, 1, 2)}}]
    asked = {"messages": [GOOD["messages"][0], {"role": "assistant", "tool_calls": calls}]}
    path.write_bytes(table_of([asked]))
    made = Outcome(replace(chats_of_tiny, template=template), str(path))
    assert made.kept == 1


def test_a_byte_order_mark_is_no_fault(outcome: Prepare, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        path = tmp_path / name
        content = b"prompt,completion\na,b\n" if name == "a.csv" else LINE
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert outcome(str(path)).kept == 1


def test_blocks_are_bounded_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE * 2500)
    blocks = list(read_blocks(Source(path=str(path)), {}))
    assert [block.first for block in blocks] == [1, 1001, 2001]
    assert blocks[2].where(499) == f"{path} line 2500"
    wide = row(text="x" * 1_000_000)
    path.write_bytes(wide * 20)
    sizes = [len(block.payload) for block in read_blocks(Source(path=str(path)), {})]
    assert max(sizes) < sources.BLOCK_BYTES + sources.MAX_ROW_BYTES and len(sizes) == 3
