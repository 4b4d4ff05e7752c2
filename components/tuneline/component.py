"""KFP components: a recipe is checked as a whole, on a CPU node, before anything else runs."""

from typing import Any

from tuneline.finetune.methods import Method
from tuneline.generated import component, signature_of, values_of


def check_recipe(method: Method) -> Any:
    """The component `check_recipe` with the hyperparameters of `method`."""
    return component(
        "check_recipe",
        f'''
def check_recipe(
    run_id: str,
    base_model: str,
    data: dict,
    {signature_of(method)}
    training: dict,
    evaluation: dict,
    gate: dict,
    export: dict,
    registry: dict,
    experiment: str,
) -> dict:
    """Fail with every fault of the recipe, or return it with all defaults filled in."""
    from tuneline import steps

    return steps.guard(
        steps.check_recipe,
        base_model=base_model,
        sections={{
            "data": data,
            "method": {values_of(method)},
            "training": training,
            "evaluation": evaluation,
            "gate": gate,
            "export": export,
            "registry": {{**registry, "experiment": experiment}},
        }},
        run_id=run_id,
        experiment=experiment,
    )
''',
    )
