"""A recipe is checked as a whole, and each fault says what is allowed."""

import json
from pathlib import Path

import pytest

from tuneline import recipe
from tuneline.errors import RecipeError

EXAMPLES = sorted(
    p for p in (Path(__file__).parents[2] / "examples").glob("*.yaml") if p.stem != "schedules"
)
GOOD = {
    "model": {"base_model": "demo"},
    "data": {"train": "demo:train"},
    "registry": {"model_name": "m"},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_is_a_recipe(path: Path) -> None:
    assert recipe.read(path).registry.model_name


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_all_faults_are_reported_at_once_with_suggestions() -> None:
    values = {
        **GOOD,
        "data": {"train": "a.jsonl", "max_seq_length": 5},
        "training": {"learning_rate": -1, "epoch": 3},
        "trainning": {},
    }
    with pytest.raises(RecipeError) as caught:
        recipe.resolve(values, source="r.yaml")
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "r.yaml: 4 faults" in text
    assert "data.max_seq_length: unknown key" in text and "Did you mean 'max_seq_len'?" in text
    assert "training.epoch: unknown key" in text and "Did you mean 'epochs'?" in text
    assert "training.learning_rate: input should be greater than 0, got -1" in text
    assert "Did you mean 'training'?" in text


def test_an_unknown_method_lists_the_methods() -> None:
    with pytest.raises(RecipeError, match=r"method 'lorra' is unknown.*Did you mean 'lora'"):
        recipe.resolve({**GOOD, "method": {"name": "lorra"}})
    with pytest.raises(RecipeError, match=r"method 'lorra' is unknown.*Did you mean 'lora'"):
        recipe.method_settings({"name": "lorra"})


def test_missing_sections_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.resolve({})
    assert {"model: is required", "data: is required", "registry: is required"} == set(
        caught.value.faults
    )


def test_only_full_fine_tuning_can_be_divided_over_processes() -> None:
    divided = {"training": {"sharding": "full"}}
    with pytest.raises(RecipeError, match=r"sharding: full is not possible with method lora.*full"):
        recipe.resolve({**GOOD, **divided})
    resolved = recipe.resolve({**GOOD, **divided, "method": {"name": "full"}})
    assert resolved.training.sharding == "full"


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(GOOD))
    resolved = recipe.read(
        path,
        ["training.learning_rate=1e-3", "method.target_modules=[k_proj]", "data.train=b.jsonl"],
    )
    assert resolved.training.learning_rate == 1e-3
    assert resolved.method.target_modules == ("k_proj",)
    assert [source.path for source in resolved.data.train] == ["b.jsonl"]


@pytest.mark.parametrize("override", ["training", "training=3", "training.epochs", ".=", "x"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        recipe.resolve(recipe.apply_overrides(GOOD, [override]))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text", "", "\x00"])
def test_a_file_that_is_no_mapping_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml: 1 fault"):
        recipe.read(path)


def test_a_resolved_recipe_resolves_to_itself_even_with_whole_floats() -> None:
    values = recipe.resolve(GOOD).model_dump(mode="json")
    values["method"]["rank"] = 8.0  # kfp.local turns integers inside dicts into floats
    assert recipe.resolve(values).model_dump(mode="json") == recipe.resolve(GOOD).model_dump(
        mode="json"
    )


def test_the_schema_describes_every_key() -> None:
    schema = recipe.json_schema()
    for definition in schema["$defs"].values():
        for name, key in definition["properties"].items():
            assert key.get("description") or "const" in key, name
