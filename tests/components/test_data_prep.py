"""The prepared data set: stable splits, no duplicates, no leakage, a contract that fails closed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline import steps
from tuneline.artifacts import Artifact, digest_of_file
from tuneline.base_model import cache_dir
from tuneline.data_prep import encode
from tuneline.data_prep.duplicates import (
    Scratch,
    find_similar,
    signatures,
    units,
    units_of_all,
)
from tuneline.data_prep.prepare import PAGE, load_split, prepare
from tuneline.data_prep.report import render_contract
from tuneline.errors import DataError, ModelError
from tuneline.evaluate.rows import read_test_rows
from tuneline.recipe import DataSection

Chats = list[dict[str, Any]]
Prepare = Callable[..., Artifact]


def write(path: Path, rows: Chats) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path) -> Prepare:
    """Prepares rows, or what `train` names."""
    made = iter(range(100))

    def run(rows: Chats | None = None, **data: Any) -> Artifact:
        number = next(made)
        if rows is not None:
            data["train"] = write(tmp_path / f"rows-{number}.jsonl", rows)
        section = DataSection.model_validate(data)
        return prepare(str(tiny_model), section, tmp_path / f"out-{number}")

    return run


def ids_of(dataset: Artifact, split: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in load_split(dataset, split)["input_ids"]]


SPLITS = ("train", "validation", "test")


def test_a_row_keeps_its_split_when_the_data_grows(prepared: Prepare, chats: Chats) -> None:
    small = prepared(chats[:120])
    large = prepared(chats[:50] + [chat(f"new {n}", "x") for n in range(40)] + chats[50:])
    for split in SPLITS:
        assert set(ids_of(small, split)) <= set(ids_of(large, split))
        assert len(ids_of(large, split)) > 5


def test_equal_groups_stay_in_one_split(prepared: Prepare) -> None:
    rows = [chat(f"question {n}", "a", customer=n % 40) for n in range(400)]
    dataset = prepared(rows, group_by="customer", test_fraction=0.3)
    tests = dataset.read_jsonl("test_rows.jsonl")
    customers = {row["columns"]["customer"] for row in tests}
    assert len(tests) == 10 * len(customers)
    assert 5 < len(customers) < 35
    with pytest.raises(DataError, match="no column 'client' to group by"):
        prepared(rows, group_by="client")


def test_a_training_row_that_opens_like_a_held_out_one_of_another_group_goes(
    prepared: Prepare,
) -> None:
    rows = [chat(f"question {n % 200}", f"answer {n}", customer=n) for n in range(400)]
    dataset = prepared(rows, group_by="customer", test_fraction=0.4)
    questions = {row["question"] for row in dataset.read_jsonl("test_rows.jsonl")}
    contract = dataset.read_json("contract.json")
    assert contract["in_test_dropped"] > 30
    assert contract["leakage"]["resembled_by_set"]["test"] >= contract["in_test_dropped"] / 2
    texts = [sample["pieces"][0]["text"] for sample in contract["samples"]]
    assert len(questions) > 50 and texts


def test_a_conversation_and_its_continuation_are_never_in_different_splits(
    prepared: Prepare, chats: Chats
) -> None:
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    rows = [*chats, *({"messages": chat["messages"] + more} for chat in chats)]
    dataset = prepared(rows, test_fraction=0.3)
    short, long = (
        {ids for ids in ids_of(dataset, "test") if ids.count(1) == turns}
        for turns in (2, 4)  # token 1 opens a turn
    )
    assert len(short) == len(long) > 20
    assert all(any(row[: len(opening)] == opening for row in long) for opening in short)


def test_duplicates_and_rows_of_the_test_file_are_dropped_and_counted(
    prepared: Prepare, chats: Chats, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.jsonl", chats[95:110])
    dataset = prepared(chats[:100] + chats[:7], test=test)
    contract = dataset.read_json("contract.json")
    assert contract["rows_in"] == 122
    assert contract["duplicates_dropped"] == 7
    assert contract["in_test_dropped"] == 5
    assert contract["splits"]["test"]["rows"] == 15
    assert sum(split["rows"] for split in contract["splits"].values()) == 110
    tests = set(ids_of(dataset, "test"))
    assert not tests & {*ids_of(dataset, "train"), *ids_of(dataset, "validation")}


QUESTION = "which of the following seven metals melts at the lowest temperature"


def test_a_question_of_an_evaluation_set_is_known_whatever_is_around_it(
    prepared: Prepare, chats: Chats, tmp_path: Path
) -> None:
    held = write(tmp_path / "bench.jsonl", [chat(f"{QUESTION} {n}?", "7") for n in range(20)])
    rows = [
        {"messages": [{"role": "system", "content": "Think first."},
                      {"role": "user", "content": f"{QUESTION.title()}  {n}?"},
                      {"role": "assistant", "content": f"Let me see, mercury, so {n}. " * 9}]}
        for n in range(20)
    ]  # fmt: skip
    contract = prepared([*chats, *rows], evaluation_sets=held).read_json("contract.json")
    assert contract["leakage"]["resembled_by_set"][held] >= 10
    assert 10 <= contract["in_test_dropped"] + contract["leaking_dropped"] <= 20
    with pytest.raises(DataError, match="held-out rows that a training row resembles"):
        prepared([*chats, *rows], evaluation_sets=held, leakage="report")
    kept = prepared(
        [*chats, *rows],
        evaluation_sets=held,
        leakage="report",
        contract={"max_leaked_fraction": 1.0},
    ).read_json("contract.json")
    assert kept["in_test_dropped"] == 0
    assert kept["leakage"]["still_resembled_heldout_rows"] >= 10


def test_one_task_with_many_answers_can_be_prepared_where_that_is_asked_for(
    prepared: Prepare,
) -> None:
    rows = [chat("Write a poem.", f"poem number {n} about {n * n}", id=n) for n in range(300)]
    with pytest.raises(DataError, match="open alike"):
        prepared(rows)
    settings = {"group_by": "id", "leakage": "report", "contract": {"max_leaked_fraction": 1.0}}
    contract = prepared(rows, **settings).read_json("contract.json")
    assert contract["rows_out"] == 300 and contract["splits"]["test"]["rows"] > 10


def test_a_question_in_a_script_without_spaces_is_known_whatever_its_spacing(
    prepared: Prepare, chats: Chats, tmp_path: Path
) -> None:
    asked = [f"请问 2024年{a}{b}的平均气温是多少?" for a in "春夏秋冬" for b in "东南西北中"]
    held = write(tmp_path / "bench.jsonl", [chat(text, "7") for text in asked])
    rows = [chat(text.replace(" ", ""), f"it is warm there, {n}") for n, text in enumerate(asked)]
    contract = prepared([*chats, *rows], evaluation_sets=held).read_json("contract.json")
    # the others are held out themselves
    assert 10 <= contract["leakage"]["resembled_by_set"][held] == contract["in_test_dropped"] <= 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Plain  WORDS\nonly", ["plain", "words", "only"]),
        ("caf\u00e9 na\u00efve \u201cquoted\u201d", ["café", "naïve", "“quoted”"]),
        ("\u043f\u0440\u0438\u0432\u0435\u0442 \ud55c\uad6d\uc5b4", ["привет", "한국어"]),
        ("用pip 安装", ["用", "pip", "安", "装"]),
        ("カタカナ ไทย", ["カ", "タ", "カ", "ナ", "ไ", "ท", "ย"]),
        ("a" * 30, ["a"] * 30),
    ],
)
def test_words_are_split_at_spaces_and_scripts_without_them_into_characters(
    text: str, found: list[str]
) -> None:
    assert units(text) == found


def test_one_message_without_spaces_makes_no_row_of_characters() -> None:
    link = "https://example.org/" + "x" * 90
    answer = "a plain answer of quite a few words that say what the link is about"
    words, each = units_of_all([link, answer])
    assert words == [link, *answer.split()] and each == [[link], answer.split()]
    assert units_of_all([link, "ok"])[0] == list(f"{link}\nok")
    assert units_of_all([]) == ([], [])
    assert units_of_all(["\u7528 pip", "a b"])[0] == ["\u7528", "pip", "a", "b"]


WORDS = [f"w{n}" for n in range(500)]


def long_text(draw: random.Random, count: int = 60) -> list[str]:
    return draw.choices(WORDS, k=count)


def changed(words: list[str]) -> str:
    return " ".join([*words[:30], "other", *words[31:]])


def test_near_duplicates_go_within_a_split_and_leaks_across(
    prepared: Prepare, tmp_path: Path
) -> None:
    draw = random.Random(3)
    texts = [long_text(draw) for _ in range(300)]
    rows = [chat(" ".join(words), f"answer {n}") for n, words in enumerate(texts)]
    near = [chat(changed(words).upper(), f"answer {n}") for n, words in enumerate(texts[:60])]
    held = write(tmp_path / "bench.jsonl", [chat(changed(words), "b") for words in texts[100:120]])
    data = {"near_duplicate_similarity": 0.7, "evaluation_sets": held}
    contract = prepared(rows + near, **data).read_json("contract.json")
    leakage = contract["leakage"]
    # a changed row is in the split of its original (0.8^2 + 2 * 0.1^2 of the cases) or leaks
    assert 30 <= contract["near_duplicates_dropped"] <= 55
    assert leakage["resembled_heldout_rows"] >= 20
    assert leakage["still_resembled_heldout_rows"] == 0
    assert contract["leaking_dropped"] >= 10
    assert {e["split"] for e in leakage["examples"]} >= {"evaluation set"}
    assert contract["sources"][0]["role"] == "evaluation"
    with pytest.raises(DataError, match=r"held-out rows that a training row resembles \d.* 0 %"):
        prepared(rows + near, leakage="report", **data)
    exact_only = prepared(rows + near, **data | {"near_duplicate_similarity": 1.0})
    assert exact_only.read_json("contract.json")["near_duplicates_dropped"] == 0


@given(st.integers(0, 60), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_signatures_estimate_the_jaccard_similarity(replaced: int, seed: int) -> None:
    draw = random.Random(seed)
    left = [f"{draw.random()}" for _ in range(200)]
    right = [f"{draw.random()}" for _ in range(replaced)] + left[replaced:]
    pair = signatures([left, right])
    sets = [
        {tuple([*words, "", "", "", ""][i : i + 5]) for i in range(len(words))}
        for words in (left, right)
    ]
    truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    # four standard errors of 128 hashes
    assert (pair[0] == pair[1]).mean() == pytest.approx(truth, abs=4 * 0.0442)


def test_similar_rows_are_found_among_many(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [" ".join(long_text(draw, 200)) for _ in range(2000)]
    for n in range(0, 200, 2):  # row n + 1 differs from row n in its last word
        texts[n + 1] = texts[n].rpartition(" ")[0] + " other"
    chinese = "".join(chr(0x4E00 + n) for n in range(200))
    spaced = " ".join(chr(0x5E00 + n) + chr(0x5F00 + n) for n in range(100))
    texts += ["", "short", "short", chinese, chinese + "x", spaced, spaced.replace(" ", "")]
    scratch = Scratch(tmp_path / "scratch")
    scratch.add(signatures(list(map(units, texts))))
    scratch.finish()
    group = np.zeros(len(texts), np.int64)
    group[1:100:2] = 2
    group[0:20:2] = 1
    twin, leak, echo = find_similar(scratch, group, np.ones(len(texts), bool), 0.9)
    assert np.flatnonzero(twin >= 0).tolist() == [*range(101, 200, 2), 2002, 2004, 2006]
    assert echo[:20:2].tolist() == list(range(1, 20, 2))
    assert (echo >= 0).sum() == 10
    assert leak[20:100:2].tolist() == list(range(21, 100, 2))
    assert leak[21:100:2].tolist() == list(range(20, 100, 2))
    assert (leak[:20] == -1).all() and (leak[100:] == -1).all()


def test_a_split_without_rows_says_where_they_went(prepared: Prepare, chats: Chats) -> None:
    data = {"max_seq_len": 10, "contract": {"max_too_long_fraction": 1, "min_eos_fraction": 0,
                                            "min_supervised_token_fraction": 0}}  # fmt: skip
    with pytest.raises(DataError, match="240 longer than max_seq_len 10"):
        prepared(chats, **data)


def test_the_data_is_named_by_its_digest(prepared: Prepare, chats_file: Path) -> None:
    dataset = prepared(train=str(chats_file))
    assert dataset.manifest.inputs == {str(chats_file): f"sha256:{digest_of_file(chats_file)}"}


@pytest.mark.parametrize("loss", ["assistant", "last", "all"])
def test_a_turn_of_weight_0_is_refused_where_all_is_learned(
    prepared: Prepare, chats: Chats, tmp_path: Path, loss: str
) -> None:
    weights = {"user": 0, "assistant": 1}
    weighed = [
        {"messages": [m | {"weight": weights[m["role"]]} for m in row["messages"]]} for row in chats
    ]
    if loss == "all":
        with pytest.raises(DataError, match=r"a turn has weight 0, and data\.loss is all"):
            prepared(weighed, loss=loss)
        answer = {"role": "assistant", "content": "so it is", "weight": 1}
        held = [{"messages": [{"role": "user", "content": "held out", "weight": 0}, answer]}]
        path = write(tmp_path / "held.jsonl", held)  # nothing of it is learned
        contract = prepared(chats, loss=loss, evaluation_sets=path).read_json("contract.json")
        assert contract["bad_rows_dropped"] == 0 and len(contract["sources"]) == 2
        return
    dataset, plain = prepared(weighed, loss=loss), prepared(chats, loss=loss)
    for split in SPLITS:
        assert ids_of(dataset, split) == ids_of(plain, split)


def test_sources_are_mixed_by_weight(prepared: Prepare, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [chat(f"first {n}", "a") for n in range(400)])
    second = write(tmp_path / "b.jsonl", [chat(f"second {n}", "b") for n in range(400)])
    plain = prepared(train=[first, second])
    mixed = prepared(
        train=[{"path": first, "weight": 2.5, "name": "first"}, {"path": second, "weight": 0.25}]
    )
    rows = set(ids_of(plain, "train"))
    seen = Counter(ids_of(mixed, "train"))
    times = {ids: seen[ids] for ids in rows}
    contract = mixed.read_json("contract.json")
    assert set(times.values()) == {0, 1, 2, 3}
    ours = [source["rows_out"] for source in contract["sources"]]
    assert ours[0] == 400 and 100 < ours[1] < 240
    assert contract["not_sampled"] == 400 - ours[1]
    assert contract["sources"][0]["name"] == "first"
    for split in ("validation", "test"):
        assert ids_of(mixed, split) == ids_of(plain, split)


@pytest.mark.parametrize("rule", ["truncate_left", "truncate_right", "split"])
def test_rows_that_are_too_long_are_cut_by_the_rule_and_counted(
    prepared: Prepare, rule: str
) -> None:
    rows = [chat(f"question {n}", "answer " * 30) for n in range(100)]
    limits = {"min_eos_fraction": 0.0}
    contract = prepared(rows, max_seq_len=40, overflow=rule, contract=limits).read_json(
        "contract.json"
    )
    assert contract["overflow"]["longer_rows"] == 100
    assert contract["splits"]["train"]["longest_tokens"] == 40
    rows_of_train = contract["splits"]["train"]["rows"]
    if rule == "split":
        # a test row is scored as one
        tests = contract["splits"]["test"]["rows"]
        assert contract["overflow"]["split_rows"] == 100 - tests and rows_of_train > 200
    else:
        assert 60 < rows_of_train < 100
    assert contract["eos_fraction"] == (0.0 if rule == "truncate_right" else 1.0)


@pytest.mark.parametrize("rule", ["truncate_left", "truncate_right", "split"])
@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_the_prompt_of_a_test_row_is_cut_as_its_tokens_are(
    prepared: Prepare, tiny_model: Path, rule: str, loss: str
) -> None:
    from tuneline.data_prep.chat import load_tokenizer

    answers = ["red", "red " * 20, "red " * 100]  # fits, fits behind a part, fills the row
    rows = [chat(f"plum {n} " * (30 - n % 3), answers[n % 3]) for n in range(60)]
    limits = {"min_eos_fraction": 0.0, "max_unsupervised_fraction": 1.0}
    data = {"max_seq_len": 64, "overflow": rule, "loss": loss, "test_fraction": 0.5}
    if rule == "truncate_right" and loss == "assistant":
        rows += [chat(f"plum {n}", answers[2]) for n in range(60)]  # their prompts fit
    dataset = prepared(rows, contract=limits, **data)
    tokenizer = load_tokenizer(str(tiny_model))

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    tests = read_test_rows(dataset, 1000)
    assert len(tests) > 10
    lengths = Counter()
    for row in tests:
        assert row.prompt is not None and row.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        prompt, answer = length(row.prompt), length(row.reference + "<|im_end|>")
        assert prompt < 64
        lengths[prompt + answer <= 64] += 1
        if rule != "truncate_right" and answer < 60:
            assert prompt + answer == 64
            text = tokenizer.decode(list(row.input_ids), skip_special_tokens=False)
            assert str(text).startswith(row.prompt)
    assert lengths[False] or rule != "split"


def test_unchanged_input_is_not_tokenized_again(
    prepared: Prepare, chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneline.data_prep.sources.BLOCK_ROWS", 50)
    monkeypatch.setattr("tuneline.data_prep.prepare.cpu_count", lambda: 1)
    encoded: list[int] = []
    plain = encode.Encoder.encode

    def counting(self: Any, block: Any, path: Path) -> None:
        encoded.append(block.first)
        plain(self, block, path)

    monkeypatch.setattr(encode.Encoder, "encode", counting)
    first = prepared(chats)
    assert encoded == [1, 51, 101, 151, 201]
    victim = min((cache_dir() / "tokens").glob("*.rows"))
    again = prepared(chats)
    assert len(encoded) == 5
    for split in SPLITS:
        assert ids_of(first, split) == ids_of(again, split)
    prepared([*chats, chat("one more", "a")])
    assert encoded[5:] == [201]
    prepared(chats, max_seq_len=512)
    assert len(encoded) == 11
    # a damaged or half-written block is made again
    victim.write_bytes(victim.read_bytes()[:-1])
    prepared(chats, max_seq_len=512)
    assert len(encoded) == 11
    prepared(chats)
    assert len(encoded) == 12


def test_a_change_of_our_own_code_is_another_key(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneline.data_prep.chat import chat_format, load_tokenizer
    from tuneline.data_prep.prepare import _plans

    data = DataSection.model_validate({"train": "x.jsonl"})
    (plan,) = _plans(data, chat_format(load_tokenizer(str(tiny_model)), tiny_model))
    package = Path(encode.__file__).parent
    shutil.copytree(package, tmp_path / "data_prep")
    keys = {plan.key()}
    for name in ("chat.py", "duplicates.py", "encode.py", "records.py"):
        with (tmp_path / "data_prep" / name).open("a") as file:
            file.write("# another line\n")
        encode.code_digest.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(encode, "files", lambda package: tmp_path / "data_prep")
            keys.add(plan.key())
        encode.code_digest.cache_clear()
    assert len(keys) == 5 and plan.key() in keys


def test_the_cache_forgets_what_was_not_used_for_longest(prepared: Prepare, chats: Chats) -> None:
    prepared(chats)
    prepared(chats[:100])
    folder = cache_dir() / "tokens"
    old, new = sorted(folder.glob("*.index"), key=lambda path: path.stat().st_mtime_ns)
    os.utime(old, (1, 1))
    kept = new.stat().st_size + new.with_suffix(".rows").stat().st_size
    encode.prune_cache(kept)
    assert sorted(folder.iterdir()) == sorted([new, new.with_suffix(".rows")])


RUN = """
import sys
from pathlib import Path
from tuneline.data_prep import prepare, sources
from tuneline.recipe import DataSection
sources.BLOCK_ROWS = 40
prepare.cpu_count = lambda: 2
if __name__ == "__main__":
    data = DataSection(train=sys.argv[2])
    prepare.prepare(sys.argv[1], data, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_processes_give_the_same_rows_and_a_killed_run_goes_on_where_it_was(
    prepared: Prepare, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [chat(f"question number {n}", "yes") for n in range(2160)]
    path = write(tmp_path / "rows.jsonl", rows)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    blocks = cache_dir() / "tokens"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tiny_model), path, str(tmp_path / "two")]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while len(list(blocks.glob("*.index"))) < 5 and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its workers notice
    done = {entry: entry.stat().st_mtime_ns for entry in blocks.glob("*.rows")}
    assert 5 <= len(done) < 54
    assert not (tmp_path / "two").exists()
    subprocess.run(command, env=environment, check=True)
    assert len(list(blocks.glob("*.rows"))) == 54
    assert all(entry.stat().st_mtime_ns == at for entry, at in done.items())
    assert not [entry for entry in blocks.iterdir() if entry.suffix not in (".rows", ".index")]
    shutil.rmtree(blocks)
    whole = prepared(train=path)
    from tuneline import artifacts

    parts = artifacts.load(tmp_path / "two", "prepared_dataset")
    for split in SPLITS:
        assert ids_of(whole, split) == ids_of(parts, split)
    assert whole.read_jsonl("test_rows.jsonl") == parts.read_jsonl("test_rows.jsonl")


def test_equal_blocks_are_encoded_side_by_side(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneline.data_prep.prepare.cpu_count", lambda: 4)
    rows = [chat(f"question number {n}", "yes") for n in range(300)]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name in "abcd"]
    dataset = prepared(train=paths, contract={"max_duplicate_fraction": 1})
    assert dataset.read_json("contract.json")["rows_in"] == 1200
    assert len(list((cache_dir() / "tokens").iterdir())) == 2  # one block, its rows and its index
    alone = prepared(train=paths[0])
    for split in SPLITS:
        assert ids_of(dataset, split) == ids_of(alone, split)


class Page(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_page_is_self_contained_small_and_escapes_what_data_says(prepared: Prepare) -> None:
    evil = "<script>alert(1)</script>"
    rows = [chat(f"{evil} {n}", evil + "word " * 3000) for n in range(60)]
    dataset = prepared(rows, max_seq_len=32000)
    html = (dataset.path / PAGE).read_text()
    page = Page()
    page.feed(html)
    assert "script" not in page.tags and page.links == []
    assert page.tags.count("mark") >= 10 and "rect" in page.tags
    assert "The contract holds" in html and "&lt;script&gt;" in html
    assert len(html) < 1_000_000
    assert html == render_contract(dataset.read_json("contract.json"))


def test_the_contract_counts_what_it_saw(prepared: Prepare, chats: Chats) -> None:
    contract = prepared(chats).read_json("contract.json")
    assert contract["passed"] and all(check["holds"] for check in contract["checks"])
    assert contract["rows_in"] == contract["rows_out"] == 240
    assert contract["round_trip"] == {
        "rows_checked": 14, "rows_that_differ": 0, "fraction": 1.0, "examples": [],
    }  # fmt: skip
    assert contract["eos_fraction"] == 1.0
    assert 0.05 < contract["supervised_token_fraction"] < 0.5
    counts = [sum(column) for column in contract["lengths"]["counts"].values()]
    assert counts == [split["rows"] for split in contract["splits"].values()]
    assert len(contract["samples"]) == 10
    for sample in contract["samples"]:
        learned = "".join(p["text"] for p in sample["pieces"] if p["supervised"])
        assert learned.endswith("<|im_end|>") and learned.partition("<")[0] in (
            "red", "blue", "green", "white",
        )  # fmt: skip


def test_every_supervised_turn_counts_for_the_ends(
    tiny_model: Path, tmp_path: Path, chats: Chats
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": chat["messages"] + more} for chat in chats]
    data = DataSection.model_validate({"train": write(tmp_path / "rows.jsonl", rows)})
    # the template ends no turn, so that only the row's end has a token to stop at
    with pytest.raises(DataError, match=r"supervised turns .* generation stops at 50 %, at least"):
        prepare(str(folder), data, tmp_path / "out")


def test_a_small_source_is_not_lost_among_many_rows(
    prepared: Prepare, chats: Chats, tmp_path: Path
) -> None:
    few = write(tmp_path / "few.jsonl", [chat("how much is it?", "7"), {"oops": 1}])
    none = write(tmp_path / "none.jsonl", [{"oops": 1}, {"oops": 2}])
    allowed = {"max_bad_fraction": 0.01}
    for name in ("evaluation_sets", "test"):
        with pytest.raises(DataError, match=rf"rows of {few} that can't be used 50 %, at most 1 %"):
            prepared(chats, contract=allowed, **{name: [few]})
    for data in ({"evaluation_sets": none}, {"train": [write(tmp_path / "a.jsonl", chats), none]}):
        with pytest.raises(DataError, match=rf"no row of {none} can be used: of 2 that came in, 2"):
            prepared(
                contract={"max_bad_fraction": 1.0}, **{"train": str(tmp_path / "a.jsonl")} | data
            )


@pytest.mark.parametrize("ids", [["uuid", "7", "7"], ["id", 7.0, 7], ["id", 1.5, 2.5]])
def test_ids_are_known_under_their_own_name_and_as_numbers_of_a_table(
    prepared: Prepare, chats: Chats, tmp_path: Path, ids: list[Any]
) -> None:
    name, first, second = ids
    rows = [*chats, chat("x", "y", **{name: first}), chat("z", "y", **{name: second})]
    path = write(tmp_path / "rows.jsonl", [{name: str(n)} | row for n, row in enumerate(rows, 100)])
    source = {"path": path, "columns": {"id": name}}
    if first == 1.5:
        assert prepared(train=[source]).read_json("contract.json")["repeated_ids"] == 0
        return
    with pytest.raises(DataError, match="rows with a repeated id"):
        prepared(train=[source])


def test_chats_are_checked_against_serving_also_if_they_are_few_or_long(
    prepared: Prepare, chats: Chats
) -> None:
    texts = [{"text": f"some text number {n}"} for n in range(400)]
    checked = {}
    for name, rows in {
        "no chat": texts,
        "one chat": [*texts[:333], chat("what?", "this"), *texts[333:]],
        "long chats": [chat(f"{n} " + "x" * 110_000, "this") for n in range(12)],
    }.items():
        data = {"max_seq_len": 200_000, "test_fraction": 0.3, "validation_fraction": 0.2}
        limits = {"min_supervised_token_fraction": 0}
        contract = prepared(rows, contract=limits, **data).read_json("contract.json")
        checked[name] = contract["round_trip"]["rows_checked"]
        assert contract["round_trip"]["fraction"] == 1.0
    assert checked == {"no chat": 0, "one chat": 1, "long chats": 1}


def test_the_page_stays_small_whatever_a_bad_row_holds(
    prepared: Prepare, chats: Chats, tmp_path: Path
) -> None:
    bad = {"messages": [{"role": "x" * 3_000_000, "content": "c"}]}
    with pytest.raises(DataError) as caught:
        prepared([*chats, bad, *[{"x" * 1000 + str(n): n} for n in range(50)]])
    assert len(str(caught.value)) < 5000
    assert (tmp_path / "out-0.refused" / PAGE).stat().st_size < 1_000_000


BROKEN_CONTRACTS = {  # rows, settings -> part of the sentence
    "bad rows": ([{"oops": 1}], {}, r"rows that can't be used 0\.415 %, at most 0 % allowed by "
                                    r"data\.contract\.max_bad_fraction"),
    "repeated ids": ([chat("x", "y", id="7"), chat("z", "y", id="7")], {}, "repeated id"),
    "duplicates": ([chat("x", "y")] * 300, {}, r"duplicates 55\.4 %"),
    "too long": ([chat("x", "y " * 900)] * 3, {"max_seq_len": 64,
                 "contract": {"max_too_long_fraction": 0}}, "too long"),
    "no supervision": ([], {"max_seq_len": 8, "overflow": "truncate_right"},
                       "without a token to learn 100 %"),
    "little supervision": ([], {"contract": {"min_supervised_token_fraction": 0.9}},
                           "supervised share"),
    "no end": ([chat(f"{n}", "y " * 90) for n in range(300)],
               {"max_seq_len": 64, "overflow": "truncate_right"}, "generation stops at"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_CONTRACTS)
def test_a_broken_contract_fails_and_leaves_its_report(
    prepared: Prepare, chats: Chats, tmp_path: Path, name: str
) -> None:
    rows, data, sentence = BROKEN_CONTRACTS[name]
    with pytest.raises(DataError, match=f"data contract is broken: .*{sentence}") as caught:
        prepared([*chats, *rows], **data)
    assert not (tmp_path / "out-0").exists()
    place = tmp_path / "out-0.refused"
    assert str(place / PAGE) in str(caught.value)
    contract = json.loads((place / "contract.json").read_text())
    assert not contract["passed"] and contract["faults"]
    assert "The contract is broken" in (place / PAGE).read_text()


def test_the_report_of_a_refused_try_goes_when_the_next_one_starts(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    data = {"train": str(chats_file)}
    strict = DataSection.model_validate(data | {"contract": {"min_supervised_token_fraction": 0.9}})
    for _ in range(2):
        with pytest.raises(DataError, match="supervised share"):
            prepare(str(tiny_model), strict, tmp_path / "out")
        assert (tmp_path / "out.refused" / PAGE).is_file()
    prepare(str(tiny_model), DataSection.model_validate(data), tmp_path / "out")
    assert not (tmp_path / "out.refused").exists()


def test_the_report_of_a_broken_contract_is_in_the_step_s_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'm.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    rows = write(tmp_path / "rows.jsonl", [{"oops": 1}, *[chat(f"q {n}", "a") for n in range(99)]])
    with pytest.raises(DataError, match=r"this step's MLflow run\n  - .*rows\.jsonl line 1: "):
        steps.prepare_data(
            str(tiny_model), {"train": rows}, str(tmp_path / "out"), "run-1", "experiment"
        )
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("experiment")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'prepare_data'")
    assert run.info.status == "FAILED"
    saved = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert saved == {"contract.html", "contract.json"}


def test_serving_s_tokens_are_checked_against_training_s(
    prepared: Prepare, chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast.apply_chat_template

    def other(self: Any, messages: Any, **options: Any) -> Any:
        found = plain(self, messages, **options)
        return found if isinstance(found, str) else [*found[:-1], 0]

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", other)
    with pytest.raises(DataError, match="tokens are what serving renders 0 %, at least 100 %"):
        prepared(chats)


def test_raw_text_is_trained_on_and_evaluated_beside_chats(prepared: Prepare, chats: Chats) -> None:
    rows = [*chats, *({"text": f"some text number {n}", "topic": "x"} for n in range(200))]
    dataset = prepared(rows)
    contract = dataset.read_json("contract.json")
    assert contract["sources"][0]["formats"] == {"messages": 240, "text": 200}
    tests = read_test_rows(dataset, 1000)
    assert len(tests) == contract["splits"]["test"]["rows"]
    texts = [row for row in tests if row.prompt is None]
    assert 5 < len(texts) < len(tests) - 5
    assert {row.column("topic") for row in texts} == {"x"}
    for row in tests:
        assert sum(row.supervised) == (len(row.input_ids) - 1 if row in texts else 2)


def test_a_template_with_the_date_is_rendered_anew_each_day(
    tiny_model: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    data = DataSection.model_validate({"train": str(chats_file)})
    prepare(str(folder), data, tmp_path / "today")

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.fromordinal(date.today().toordinal() + 1)

    blocks = len(list((cache_dir() / "tokens").glob("*.rows")))
    monkeypatch.setattr(encode, "date", Tomorrow)
    prepare(str(folder), data, tmp_path / "tomorrow")
    assert len(list((cache_dir() / "tokens").glob("*.rows"))) == 2 * blocks


BAD_MODELS: dict[str, tuple[str, bytes | None, str]] = {  # file, its content, part of the error
    "tokenizer cut short": ("tokenizer.json", b"{", "can't be loaded"),
    "tokenizer of nothing": ("tokenizer.json", b"", "can't be loaded"),
    "tokenizer of a list": ("tokenizer.json", b"[]", "can't be loaded"),
    "tokenizer of bytes": ("tokenizer.json", b"\xff\x00\xfe", "can't be loaded"),
    "tokenizer of another kind": (
        "tokenizer.json", b'{"model": {"type": "No"}}', "can't be loaded",
    ),
    "no tokenizer": ("tokenizer.json", None, "can't be loaded"),
    "settings of a list": ("tokenizer_config.json", b"[]", "can't be loaded"),
    "settings cut short": ("tokenizer_config.json", b"{", "malformed JSON"),
    "no end token": ("tokenizer_config.json", b"{}", "no end-of-sequence token"),
    "no template": ("chat_template.jinja", None, "has no chat template"),
    "empty template": ("chat_template.jinja", b"", "has no chat template"),
    "template with an open block": (
        "chat_template.jinja", b"{% for m in messages %}", "chat template of .* is malformed",
    ),
    "template with an unknown tag": (
        "chat_template.jinja", b"{% exec x %}", "chat template of .* is malformed",
    ),
    "template of bytes": ("chat_template.jinja", b"\xff\xfe{{ x }}", "can't be loaded"),
    "template that raises": (
        "chat_template.jinja", b"{{ raise_exception('not today') }}",
        r"can't be used 100 %(.|\n)*refuses the chat: not today",
    ),
    "template that reaches out": (
        "chat_template.jinja", b"{{ messages.__class__.__base__.__subclasses__() }}",
        r"can't be used 100 %(.|\n)*refuses the chat",
    ),
    "template that includes a file": (
        "chat_template.jinja", b"{% include '/etc/passwd' %}",
        r"can't be used 100 %(.|\n)*refuses the chat",
    ),
    "template without answers": (
        "chat_template.jinja", b"{{ messages[0].content }}",
        r"can't be used 100 %(.|\n)*renders nothing of the answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_tokenizer_or_template_that_cannot_be_used_is_one_clear_error(
    tiny_model: Path, chats_file: Path, tmp_path: Path, name: str
) -> None:
    file, content, sentence = BAD_MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    data = DataSection.model_validate({"train": str(chats_file)})
    with pytest.raises((ModelError, DataError), match=sentence):
        prepare(str(folder), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
