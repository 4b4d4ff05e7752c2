"""The demo's test split shares no sentence clause, name or item word with training."""

import json
import re
from pathlib import Path

import pytest

from tuneline.data_prep.sources import DEMO_SOURCES
from tuneline.demo import model, orders
from tuneline.errors import ModelError


def messages(chats: list[dict[str, object]]) -> list[tuple[str, dict[str, str]]]:
    turns = [chat["messages"] for chat in chats]
    return [(turn[1]["content"], json.loads(turn[2]["content"])) for turn in turns]  # type: ignore[index]


def split(source: str) -> list[tuple[str, dict[str, str]]]:
    vocabulary, rows, seed = DEMO_SOURCES[source]
    return messages(orders.generate(getattr(orders, vocabulary), rows, seed))


def test_names_and_item_words_of_the_test_split_never_occur_in_training() -> None:
    train, test = split("demo:train"), split("demo:test")
    assert len(train) >= 640 and len(test) >= 100
    train_words = {w for text, _ in train for w in re.findall(r"[a-z']+", text.lower())}
    for _, fields in test:
        assert fields["name"].lower() not in train_words
        for word in fields["item"].split():
            assert word not in train_words


def test_no_sentence_of_the_test_split_is_built_like_one_of_training() -> None:
    def skeleton(text: str, fields: dict[str, str]) -> str:
        for key, value in fields.items():
            text = re.sub(rf"\b{re.escape(str(value))}\b", key, text, flags=re.IGNORECASE)
        return text.lower()

    train = {skeleton(*row) for row in split("demo:train")}
    test = {skeleton(*row) for row in split("demo:test")}
    assert not train & test
    for part in ("openers", "orders", "asides"):
        assert not set(getattr(orders.TRAIN, part)) & set(getattr(orders.TEST, part))


def test_every_field_stands_in_the_message() -> None:
    for text, fields in split("demo:train") + split("demo:test"):
        assert all(str(value).lower() in text.lower() for value in fields.values())


def test_the_same_seed_gives_the_same_rows() -> None:
    assert orders.generate(orders.TEST, 20, 5) == orders.generate(orders.TEST, 20, 5)
    assert orders.generate(orders.TEST, 20, 5) != orders.generate(orders.TEST, 20, 6)


def test_a_cached_model_cut_short_is_made_again_and_a_changed_one_is_refused(
    tmp_path: Path,
) -> None:
    folder = tmp_path / model.FOLDER
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert model.converted_model(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert model.converted_model(tmp_path) == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="changed or damaged"):
        model.converted_model(tmp_path)
