"""A base model is found, identified, and refused when it is not safe to load."""

import json
import shutil
from pathlib import Path

import pytest

from tuneline import base_model
from tuneline.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_local_folder_is_identified_by_its_content(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    first = base_model.resolve(str(tiny_model))
    assert base_model.resolve(str(copy)).digest == first.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert base_model.resolve(str(copy)).digest != first.digest
    assert "path" not in first.identity() and str(tmp_path) not in str(first.identity())


def test_a_pinned_hub_model_is_found_in_the_hub_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/models--acme--tiny/snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = base_model.resolve(f"hf://acme/tiny@{COMMIT}")
    assert found.path == snapshot
    assert found.revision == COMMIT
    assert found.digest == base_model.resolve(str(tiny_model)).digest


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("no/such/folder", "is no folder: give a local folder"),
        ("hf://acme/tiny", "revision '' is not pinned"),
        ("hf://acme/tiny@main", "revision 'main' is not pinned"),
        ("hf://tiny@main", "is not of the form"),
        (f"hf://acme/absent@{COMMIT}", "neither in the cache nor to be had"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(reference: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        base_model.resolve(reference)


def _with_pickle_only(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))


def _with_remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json can't be read"),
        (lambda p: (p / "config.json").write_text("[3]"), "names no architectures"),
        (_with_pickle_only, r"no model.safetensors or index \(found pytorch_model.bin"),
        (_with_remote_code, "brings its own Python code"),
        (lambda p: [f.unlink() for f in p.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_an_unsafe_or_incomplete_folder_is_refused(
    tiny_model: Path, tmp_path: Path, change, sentence: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    change(folder)
    with pytest.raises(ModelError, match=sentence):
        base_model.resolve(str(folder))
