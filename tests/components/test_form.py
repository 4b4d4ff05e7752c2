"""A filled run form and a recipe are two ways to say the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline import form, recipe
from tuneline.errors import RecipeError
from tuneline.finetune.methods import METHODS

BASE: dict[str, Any] = {
    "model": {"base_model": "demo"},
    "data": {"train": "demo:train"},
    "registry": {"model_name": "m"},
}
COMMON = ["overrides", *form.FIELDS]


def names_of(method: Any) -> list[str]:
    """Parameters of `finetune-METHOD`."""
    return [*COMMON, *(found.name for found in form.shown_of(method))]


def back(arguments: dict[str, Any], method: str | None, names: list[str]) -> recipe.Recipe:
    """The recipe that a form with these values stands for."""
    fields = {name: arguments[name] for name in form.FIELDS if name in names}
    hidden = {"gpu_pool", "overrides", "method", "methods", *form.FIELDS}
    hyperparameters = {k: v for k, v in arguments.items() if k not in hidden}
    sections = form.sections_of(
        fields, arguments["overrides"], method=method, hyperparameters=hyperparameters
    )
    return recipe.resolve(sections)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_recipe_survives_the_form_of_its_method(method: Any) -> None:
    values = {
        **BASE,
        "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "test": "c.jsonl",
                 "contract": {"max_bad_fraction": 0.1}},
        "method": {"name": method.name},
        "training": {"seed": 7, "epochs": 2.5, "precision": "fp32"},
        "gate": {"metric": "rouge_l", "champion": "not_worse"},
        "evaluation": {"metrics": ["rouge_l", "exact_match"]},
        "registry": {"model_name": "m", "require_approval": True, "experiment": "e"},
        "retrain": {"min_new_rows": 10},
    }  # fmt: skip
    resolved = recipe.resolve(values)
    names = names_of(method)
    arguments = form.arguments_of(resolved, names)
    assert set(arguments) == set(names) and len(names) < form.MOST_PARAMETERS
    assert arguments["train_data"] == "" and arguments["test_data"] == "c.jsonl"
    assert arguments["epochs"] == 2.5 and "epochs" not in str(arguments["overrides"])
    assert back(arguments, method.name, names) == resolved


def test_a_hyperparameter_without_a_parameter_travels_in_overrides() -> None:
    resolved = recipe.resolve({**BASE, "method": {"name": "lora", "use_dora": True, "rank": 4}})
    names = names_of(recipe.method_named("lora"))
    arguments = form.arguments_of(resolved, names)
    assert arguments["rank"] == 4
    assert arguments["overrides"] == {"method": {"use_dora": True}}
    assert back(arguments, "lora", names) == resolved


def test_the_forms_of_retrain_and_compare_carry_the_whole_recipe() -> None:
    values = {**BASE, "method": {"name": "qlora", "rank": 4}, "compare": {"x": {"method": "ia3"}}}
    resolved = recipe.resolve(values)
    names = [*COMMON, "method"]
    arguments = form.arguments_of(resolved, names)
    assert arguments["method"] == "qlora" and arguments["overrides"]["method"] == {"rank": 4}
    assert back(arguments, "qlora", names) == resolved
    names = ["base_model", "train_data", "test_data", "methods", "epochs", "precision", "overrides",
             "experiment"]  # fmt: skip
    arguments = form.arguments_of(resolved, names)
    assert arguments["overrides"]["method"] == {"rank": 4, "name": "qlora"}
    assert arguments["overrides"]["compare"] == {"x": {"method": "ia3"}}
    assert back(arguments, None, names) == resolved


def test_the_demo_recipe_survives_as_the_json_of_a_run() -> None:
    path = Path(__file__).parents[2] / "examples/demo.yaml"
    resolved = recipe.read(path)
    names = names_of(recipe.method_of(resolved.method))
    arguments = yaml.safe_load(yaml.safe_dump(form.arguments_of(resolved, names)))
    assert back(arguments, "lora", names) == resolved


def test_what_the_form_leaves_open_is_not_set() -> None:
    sections = form.sections_of(
        {**form.DEFAULTS, "test_data": "", "learning_rate": 0.0}, {}, method="ia3",
        hyperparameters={},
    )  # fmt: skip
    resolved = recipe.resolve(sections)
    assert resolved.data.test == () and resolved.training.learning_rate == 0.003


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"trainin": {"seed": 1}}, "'trainin' is no section of a recipe"),
        ({"training": 5}, "training must be a mapping of settings, not 5"),
        ({"method": {"name": "ia3"}}, "method.name 'ia3' is not this run's method lora"),
        ({"method": {"name": "lorra"}}, "Did you mean 'lora'"),
        ({"registry": {"experiment": "x"}}, "set the parameter experiment"),
    ],
)
def test_overrides_that_are_no_part_of_a_recipe_are_refused(overrides: dict, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault) as error:
        form.sections_of(form.DEFAULTS, overrides, method="lora", hyperparameters={})
    assert str(error.value).startswith("overrides: 1 fault")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*recipe.SECTIONS, "name", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    ).filter(lambda value: isinstance(value, dict))
)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_overrides_is_used_or_refused_in_words(overrides: dict) -> None:
    try:
        recipe.resolve(
            form.sections_of(form.DEFAULTS, overrides, method="lora", hyperparameters={})
        )
    except RecipeError as error:
        assert error.faults


def test_choices_are_the_values_that_the_recipe_takes() -> None:
    choices = form.literals_of(METHODS, ["a100"])
    assert choices["gpu_pool"] == ["a100"]
    assert choices["gate_champion"] == ["better", "not_worse", "ignore"]
    assert choices["non_linearity"] == ["relu", "gelu", "silu", "tanh"]
    assert choices["method"] == [method.name for method in METHODS]
