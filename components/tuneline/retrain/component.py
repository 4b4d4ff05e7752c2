"""KFP component: has a retraining anything to do? On a CPU node, before anything else runs."""

# KFP ships a function alone, so the type of several outputs has to stand in its annotation
# pyright: reportInvalidTypeForm=false
from typing import NamedTuple

from kfp import dsl

from tuneline.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def check_retrain(
    run_id: str,
    base_model: str,
    train_data: str,
    test_data: str,
    model_name: str,
    method: str,
    epochs: float,
    learning_rate: float,
    precision: str,
    gate_champion: str,
    overrides: dict,
    experiment: str,
) -> NamedTuple(
    "Decided",
    [
        ("base_model", str),
        ("data", dict),
        ("training", dict),
        ("evaluation", dict),
        ("gate", dict),
        ("export", dict),
        ("registry", dict),
        ("method", dict),
        ("expected", dict),
        ("Output", str),  # the action: kfp.local reads no other name in a condition
        ("reason", str),
        ("key", str),
        ("version", int),
    ],
):
    """Fail with every fault of the recipe, or decide: train, promote what was made, or nothing."""
    from tuneline import steps

    return steps.guard(
        steps.check_retrain,
        values={
            "base_model": base_model,
            "train_data": train_data,
            "test_data": test_data,
            "model_name": model_name,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "precision": precision,
            "gate_champion": gate_champion,
            "experiment": experiment,
        },
        method=method,
        overrides=overrides,
        run_id=run_id,
        experiment=experiment,
    )
