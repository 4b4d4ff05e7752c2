"""KFP components: PreparedDataset -> Adapter, one per method with that method's parameters, and one
for a method that is known at run time only."""

from typing import Any

from kfp import dsl

from tuneline.finetune.methods import Method
from tuneline.form import hyperparameters_of
from tuneline.generated import component, signature_of, values_of
from tuneline.images import GPU


def finetune(method: Method) -> Any:
    """The component `finetune_NAME` of a method."""
    name = f"finetune_{method.name}"
    return component(
        name,
        f'''
def {name}(
    run_id: str,
    experiment: str,
    base_model: str,
    dataset: dsl.Input[dsl.Dataset],
    {signature_of(hyperparameters_of(method))}
    training: dict,
    adapter: dsl.Output[dsl.Model],
):
    """{method.title}."""
    from tuneline import steps

    steps.guard(
        steps.finetune,
        base_model=base_model,
        dataset=dataset.path,
        method={{"name": "{method.name}", **{values_of(hyperparameters_of(method))}}},
        training=training,
        output=adapter.path,
        run_id=run_id,
        experiment=experiment,
    )
''',
        GPU,
    )


@dsl.component(base_image=GPU, install_kfp_package=False)
def finetune_chosen(
    run_id: str,
    experiment: str,
    base_model: str,
    dataset: dsl.Input[dsl.Dataset],
    method: dict,
    training: dict,
    adapter: dsl.Output[dsl.Model],
):
    """Train with the method that the dict names."""
    from tuneline import steps

    steps.guard(
        steps.finetune,
        base_model=base_model,
        dataset=dataset.path,
        method=method,
        training=training,
        output=adapter.path,
        run_id=run_id,
        experiment=experiment,
    )
