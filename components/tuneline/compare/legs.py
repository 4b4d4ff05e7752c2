"""Which methods a comparison trains, and with what settings.

The recipe's own method keeps the recipe's hyperparameters and learning rate; every other leg has
its method's defaults, since a setting that is right for one method says nothing of another. The
recipe's `compare` section changes single settings of a leg, and adds legs:

    compare:
      bitfit: {missing_biases: add}
      lora-r64: {method: lora, rank: 64, alpha: 128}

Everything else is the same for all: data, seed, token budget, schedule, evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tuneline.errors import RecipeError, did_you_mean
from tuneline.finetune.methods import METHODS
from tuneline.finetune.methods.method import MethodSettings
from tuneline.recipe import Recipe, TrainingSection, check, method_of, method_settings

ALL: Final = "all"


@dataclass(frozen=True)
class Leg:
    """One training of a comparison."""

    name: str
    settings: MethodSettings
    training: TrainingSection
    """With this leg's learning rate."""

    def values(self) -> dict[str, Any]:
        """As a JSON value without nulls, which KFP's dicts can't hold."""
        return {
            "name": self.name,
            "method": self.settings.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude_none=True),
        }


def leg_of(values: Mapping[str, Any]) -> Leg:
    """The leg that `Leg.values` gave.

    Raises:
        RecipeError: with every fault.
    """
    training = check(TrainingSection, values["training"], source=f"training of {values['name']}")
    return Leg(str(values["name"]), method_settings(values["method"]), training)


def legs_of(recipe: Recipe, methods: Sequence[str], *, source: str = "recipe") -> list[Leg]:
    """The legs of a comparison, in the order of METHODS, then of the recipe's `compare` section.

    Args:
        recipe: with a `compare` section or without.
        methods: names of methods or of legs of that section; `all` for all of both.
        source: what errors name.

    Raises:
        RecipeError: with every fault.
    """
    known = list(dict.fromkeys([*(method.name for method in METHODS), *recipe.compare]))
    chosen = [name for name in known if name in methods or ALL in methods]
    faults = [
        f"method '{name}' is unknown; compared can be {', '.join([ALL, *known])}."
        f"{did_you_mean(name, known)}"
        for name in methods
        if name not in (ALL, *known)
    ]
    if not chosen and not faults:
        faults.append(f"no method to compare; give some of {', '.join([ALL, *known])}")
    legs = []
    # legs that are not chosen are checked too, as all of a recipe is
    for name in dict.fromkeys([*chosen, *recipe.compare]):
        try:
            leg = _leg(recipe, name)
        except RecipeError as error:
            faults += [f"compare.{name}: {fault}" for fault in error.faults]
        else:
            legs += [leg] if name in chosen else []
    if faults:
        raise RecipeError(source, faults)
    return legs


def _leg(recipe: Recipe, name: str) -> Leg:
    changes = dict(recipe.compare.get(name, {}))
    of_method = str(changes.pop("method", name))
    rate = changes.pop("learning_rate", None)
    own = of_method == method_of(recipe.method).name
    settings = method_settings(
        {**(recipe.method.model_dump(mode="json") if own else {}), **changes, "name": of_method}
    )
    if rate is None:
        rate = recipe.training.learning_rate if own else None
    if rate is None:
        rate = method_of(settings).learning_rate
    training = check(
        TrainingSection,
        {**recipe.training.model_dump(mode="json"), "learning_rate": rate},
        source=name,
    )
    return Leg(name, settings, training)
