"""KFP components of a run's beginning, on a CPU node, before anything else runs: the recipe is
checked as a whole, and the node pool is looked up."""

# KFP ships a function alone, so the type of several outputs has to stand in its annotation
# pyright: reportInvalidTypeForm=false
from typing import Any, NamedTuple

from kfp import dsl

from tuneline.finetune.methods import Method
from tuneline.form import shown_of
from tuneline.generated import component, outputs_of, signature_of, values_of
from tuneline.images import CPU


def check_recipe(method: Method) -> Any:
    """The component `check_recipe` with the run form of `method`; all hyperparameters come out."""
    return component(
        "check_recipe",
        f'''
def check_recipe(
    run_id: str,
    base_model: str,
    train_data: str,
    test_data: str,
    model_name: str,
    {signature_of(shown_of(method))}
    epochs: float,
    learning_rate: float,
    precision: str,
    gate_champion: str,
    overrides: dict,
    experiment: str,
) -> NamedTuple("Resolved", [
    ("base_model", str),
    ("data", dict),
    ("training", dict),
    ("evaluation", dict),
    ("gate", dict),
    ("export", dict),
    ("registry", dict),
    {outputs_of(method)}
]):
    """Fail with every fault of the recipe, or return it with all defaults filled in."""
    from tuneline import steps

    return steps.guard(
        steps.check_recipe,
        values={{
            "base_model": base_model,
            "train_data": train_data,
            "test_data": test_data,
            "model_name": model_name,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "precision": precision,
            "gate_champion": gate_champion,
            "experiment": experiment,
        }},
        method="{method.name}",
        hyperparameters={values_of(shown_of(method))},
        overrides=overrides,
        run_id=run_id,
        experiment=experiment,
    )
''',
        CPU,
    )


@dsl.component(base_image=CPU, install_kfp_package=False)
def resolve_pool(run_id: str, experiment: str, gpu_pool: str) -> NamedTuple(
    "Placement",
    [
        ("accelerator", str),
        ("count", str),
        ("one", str),
        ("cpu", str),
        ("memory", str),
        ("node_selector", dict),
        ("tolerations", list),
        ("node_affinity", dict),
    ],
):
    """What the steps with an accelerator ask of Kubernetes, from the cluster's pools file."""
    from tuneline import steps

    return steps.guard(steps.resolve_pool, gpu_pool=gpu_pool, run_id=run_id, experiment=experiment)
