"""The run form of a pipeline: a few typed parameters, and `overrides` for the rest of a recipe.

KFP's form shows a parameter's name and type, no description, and sends every value that it shows:
so a name has to explain itself, and every parameter has a default that works. An empty text and a
learning rate of 0 stand for "not set". `overrides` is a part of a recipe, nested as the YAML file
is; what it sets, it sets over the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args, get_origin

from tuneline.errors import RecipeError
from tuneline.finetune.methods import METHODS, Method
from tuneline.recipe import (
    SECTIONS,
    GateSection,
    Recipe,
    TrainingSection,
    method_of,
    unknown_method,
)

MOST_PARAMETERS: Final = 15
FIELDS: Final[dict[str, tuple[str, str]]] = {
    "base_model": ("model", "base_model"),
    "train_data": ("data", "train"),
    "test_data": ("data", "test"),
    "model_name": ("registry", "model_name"),
    "epochs": ("training", "epochs"),
    "learning_rate": ("training", "learning_rate"),
    "precision": ("training", "precision"),
    "gate_champion": ("gate", "champion"),
    "experiment": ("registry", "experiment"),
}
"""Parameter -> section and key of the recipe."""
DEFAULTS: Final[dict[str, Any]] = {
    "base_model": "demo",
    "train_data": "demo:train",
    "test_data": "demo:test",
    "model_name": "demo-orders",
    "epochs": 1.0,
    "learning_rate": 0.0,
    "precision": "auto",
    "gate_champion": "better",
    "experiment": "tuneline",
}
_PLAIN: Final[dict[type, type]] = {bool: bool, int: int, float: float, str: str}


def parameter(name: str, annotation: type, default: Any) -> inspect.Parameter:
    """A parameter of a pipeline."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def fields(*names: str) -> list[inspect.Parameter]:
    """Parameters that every method has, by name."""
    return [parameter(name, type(DEFAULTS[name]), DEFAULTS[name]) for name in names]


def hyperparameters_of(method: Method) -> list[inspect.Parameter]:
    """All of the method's hyperparameters as KFP types them, with their defaults; `name` aside."""
    values = method.config_class().model_dump(mode="json")
    return [
        parameter(key, _kfp_type(field.annotation, f"{method.name}.{key}"), values[key])
        for key, field in method.config_class.model_fields.items()
        if key != "name"
    ]


def shown_of(method: Method) -> list[inspect.Parameter]:
    """Those hyperparameters that the run form shows."""
    every = hyperparameters_of(method)
    if method.form is None:
        return every
    by_name = {found.name: found for found in every}
    return [by_name[name] for name in method.form]


def _kfp_type(annotation: Any, where: str) -> type:
    if annotation in _PLAIN:
        return annotation
    origin = get_origin(annotation)
    if origin is Literal and {type(value) for value in get_args(annotation)} == {str}:
        return str
    if origin in (tuple, list):
        return list
    raise TypeError(f"{where}: {annotation} has no KFP parameter type")


def literals_of(methods: tuple[Method, ...], pools: list[str]) -> dict[str, list[str]]:
    """Parameter -> the values that the form offers, where they are few.

    Args:
        methods: whose hyperparameters the form shows.
        pools: names of the node pools.
    """
    choices = {
        "method": [method.name for method in METHODS],
        "gpu_pool": pools,
        "precision": _values(TrainingSection.model_fields["precision"].annotation),
        "gate_champion": _values(GateSection.model_fields["champion"].annotation),
    }
    for method in methods:
        for name, field in method.config_class.model_fields.items():
            if get_origin(field.annotation) is Literal and name != "name":
                choices[name] = _values(field.annotation)
    return choices


def _values(annotation: Any) -> list[str]:
    return [str(value) for value in get_args(annotation)]


def sections_of(
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    method: str | None,
    hyperparameters: Mapping[str, Any],
) -> dict[str, Any]:
    """The sections of a recipe that a filled form stands for; they are not checked yet.

    Args:
        values: of FIELDS.
        overrides: a part of a recipe, nested.
        method: name, or None where the recipe's own decides.
        hyperparameters: of the method.

    Raises:
        RecipeError: `overrides` is no part of a recipe, or says something else than a parameter
            that other steps read too.
    """
    sections: dict[str, Any] = {}
    for name, value in values.items():
        section, key = FIELDS[name]
        if value != "" and (name, value) != ("learning_rate", 0):
            sections.setdefault(section, {})[key] = value
    if method is not None:
        sections["method"] = {"name": method, **hyperparameters}
    faults = []
    for section, changes in overrides.items():
        if section not in SECTIONS:
            faults.append(f"'{section}' is no section of a recipe ({', '.join(SECTIONS)})")
        elif not isinstance(changes, Mapping):
            faults.append(f"{section} must be a mapping of settings, not {changes!r}")
    if faults:
        raise RecipeError("overrides", faults)
    named = overrides.get("method", {}).get("name", method)
    if method is not None and named != method:
        known = any(row.name == named for row in METHODS)
        faults.append(
            f"method.name '{named}' is not this run's method {method}: leave it out, and choose "
            "the pipeline or the parameter of that method"
            if known
            else unknown_method(str(named))
        )
    if "experiment" in overrides.get("registry", {}):
        faults.append("registry.experiment: set the parameter experiment instead")
    if faults:
        raise RecipeError("overrides", faults)
    return _over(sections, overrides)


def _over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, change in changes.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(change, Mapping):
            result[key] = _over(below, change)
        else:
            result[key] = change
    return result


def arguments_of(recipe: Recipe, names: list[str]) -> dict[str, Any]:
    """A recipe as the parameters of a pipeline that has parameters of these names.

    What has no parameter, and is not the default, goes into `overrides`. `gpu_pool` is no part of a
    recipe.
    """
    everything = recipe.model_dump(mode="json", exclude_none=True)  # KFP has no null in a dict
    changed = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    method = method_of(recipe.method)
    arguments: dict[str, Any] = {}
    for name, (section, key) in FIELDS.items():
        if name not in names:
            continue
        value = everything[section].get(key, "")
        if name in ("train_data", "test_data"):
            value = _plain_source(recipe.data.train if key == "train" else recipe.data.test)
        arguments[name] = value
        if value != "" or key not in changed.get(section, {}):
            changed.get(section, {}).pop(key, None)
    changed.get("registry", {}).pop("experiment", None)
    if "method" in names:
        arguments["method"] = method.name
    own = changed.setdefault("method", {})
    for found in hyperparameters_of(method):
        if found.name in names:
            arguments[found.name] = everything["method"][found.name]
            own.pop(found.name, None)
    if "method" in names or names_one_method(names, method):
        own.pop("name", None)
    else:
        own["name"] = method.name
    arguments["overrides"] = {section: keys for section, keys in changed.items() if keys}
    return arguments


def names_one_method(names: list[str], method: Method) -> bool:
    """Whether a form with these parameters is that of `finetune-METHOD`."""
    return "methods" not in names and all(found.name in names for found in shown_of(method))


def _plain_source(sources: tuple[Any, ...]) -> str:
    """A source that is nothing but a path; else empty, and `overrides` holds it."""
    if len(sources) == 1 and not sources[0].model_dump(exclude={"path"}, exclude_defaults=True):
        return sources[0].path
    return ""
