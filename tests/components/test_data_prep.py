"""Rows are checked, masks are exact, splits are stable."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.data_prep import chat
from tuneline.data_prep.prepare import load_split, prepare
from tuneline.data_prep.records import read_records
from tuneline.errors import DataError, ModelError
from tuneline.recipe import DataSection

GOOD_ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def line(**message: object) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, message]})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"messages": [\n', "line 1: malformed JSON"),
        (json.dumps(GOOD_ROW).encode() + b"\n{oops}\n", "line 2: malformed JSON"),
        (b"\xff\xfe{}", "line 1: not UTF-8"),
        (b"[1]", "no 'messages' list"),
        (b'{"prompt": "x"}', r"no 'messages' list \(found prompt\)"),
        (b'{"messages": []}', "no 'messages' list"),
        (b'{"messages": ["x"]}', "message 1: is str"),
        (line(role="robot", content="x").encode(), "role 'robot' is unknown"),
        (line(role="assistant", content=None).encode(), "content is NoneType"),
        (line(role="assistant", content={"a": 1}).encode(), "content is dict"),
        (line(role="assistant", content="  ").encode(), "answer is empty"),
        (line(role="user", content="x").encode(), "no answer"),
        (line(role="assistant", content="\ud800").encode(), "half a character"),
        (b"[" * 100_000, "malformed JSON"),
        (line(role="assistant", content="x", weight=0).encode(), "keys weight are not supported"),
        (json.dumps(GOOD_ROW | {"tools": [{}]}).encode(), "'tools' are not supported"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        list(read_records(str(path)))
    assert "bad.jsonl" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl can't be read"):
        list(read_records(str(tmp_path / "nowhere.jsonl")))


texts = st.text(
    st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=40
).filter(lambda text: text.strip())


@given(answers=st.lists(texts, min_size=1, max_size=3), question=texts)
@settings(max_examples=60, deadline=None)
def test_the_mask_covers_exactly_the_answers_and_their_ends(
    tiny_model: Path, answers: list[str], question: str
) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))
    messages = []
    for answer in answers:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    (tokens,) = chat.tokenize(tokenizer, [chat.render(tokenizer, messages)])
    supervised = [i for i, m in zip(tokens.input_ids, tokens.supervised, strict=True) if m]
    assert tokenizer.decode(supervised) == "".join(answer + "<|im_end|>" for answer in answers)


def test_spaces_are_supervised_with_a_tokenizer_that_trims_offsets(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = chat.load_tokenizer(str(folder))
    code = "if x:\n    y  =  1 "
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": code}]
    (tokens,) = chat.tokenize(tokenizer, [chat.render(tokenizer, messages)])
    supervised = [i for i, m in zip(tokens.input_ids, tokens.supervised, strict=True) if m]
    assert tokenizer.decode(supervised) == code + "<|im_end|>"


def test_the_reference_is_what_the_template_makes_the_model_write(tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = chat.render(tokenizer, GOOD_ROW["messages"])
    assert chat.answer(tokenizer, rendered) == "<think>\n\n</think>\n\na"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD_ROW).encode())
    assert len(list(read_records(str(path)))) == 1


def test_training_sees_what_serving_renders(tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    rendered = chat.render(tokenizer, messages)
    prompt = chat.render_prompt(tokenizer, messages[:-1])
    assert rendered.text.startswith(prompt)
    assert rendered.spans == ((len(prompt), len(prompt) + len("a<|im_end|>")),)


def test_a_template_that_renders_the_answer_differently_is_refused(tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="differently in a conversation"):
        chat.render(tokenizer, GOOD_ROW["messages"])


def test_a_template_without_an_end_gets_one(tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert chat.render(tokenizer, GOOD_ROW["messages"]).text == "q a<|im_end|>"


def test_a_row_keeps_its_split_when_the_data_grows(
    tiny_model: Path, chats: list[dict[str, object]], tmp_path: Path
) -> None:
    def rows_of(count: int) -> dict[str, set[tuple[int, ...]]]:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chats[:count]))
        dataset = prepare(str(tiny_model), DataSection(train=(str(path),)), tmp_path / f"d{count}")
        return {
            split: {tuple(ids) for ids in load_split(dataset, split)["input_ids"]}
            for split in ("train", "validation", "test")
        }

    small, large = rows_of(120), rows_of(240)
    assert all(small[split] <= large[split] for split in small)
    assert all(len(rows) > 5 for rows in large.values())


def test_duplicates_and_rows_of_the_test_file_are_dropped_and_counted(
    tiny_model: Path, chats: list[dict[str, object]], tmp_path: Path
) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in chats[:100] + chats[:7]))
    test.write_text("".join(json.dumps(row) + "\n" for row in chats[95:110]))
    data = DataSection(train=(str(train),), test=(str(test),))
    contract = prepare(str(tiny_model), data, tmp_path / "out").read_json("contract.json")
    assert contract["rows_in"] == 122
    assert contract["duplicates_dropped"] == 7
    assert contract["in_test_dropped"] == 5
    assert contract["splits"]["test"]["rows"] == 15
    assert sum(split["rows"] for split in contract["splits"].values()) == 110


def test_a_split_without_rows_says_where_they_went(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    data = DataSection(train=(str(chats_file),), max_seq_len=10)
    with pytest.raises(DataError, match="240 longer than max_seq_len 10"):
        prepare(str(tiny_model), data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_and_its_continuation_are_never_in_different_splits(
    tiny_model: Path, chats: list[dict[str, list[dict[str, str]]]], tmp_path: Path
) -> None:
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    rows = [*chats, *({"messages": chat["messages"] + more} for chat in chats)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=(str(path),), test_fraction=0.3)
    dataset = prepare(str(tiny_model), data, tmp_path / "out")
    short, long = (
        {tuple(ids) for ids in load_split(dataset, "test")["input_ids"] if ids.count(1) == turns}
        for turns in (2, 4)  # token 1 opens a turn
    )
    assert len(short) == len(long) > 20
    assert all(any(row[: len(opening)] == opening for row in long) for opening in short)


def test_the_data_is_named_by_its_digest(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    from tuneline.artifacts import digest_of_file

    dataset = prepare(str(tiny_model), DataSection(train=(str(chats_file),)), tmp_path / "out")
    assert dataset.manifest.inputs == {str(chats_file): f"sha256:{digest_of_file(chats_file)}"}


def test_a_tokenizer_that_cannot_be_read_is_one_clear_error(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"):
        prepare(str(folder), DataSection(train=(str(chats_file),)), tmp_path / "out")
