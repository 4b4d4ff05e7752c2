"""KFP components: PreparedDataset -> Adapter, one per method with that method's parameters."""

from typing import Any

from tuneline.finetune.methods import Method
from tuneline.generated import component, signature_of, values_of


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
    {signature_of(method)}
    training: dict,
    adapter: dsl.Output[dsl.Model],
):
    """{method.title}."""
    from tuneline import steps

    steps.guard(
        steps.finetune,
        base_model=base_model,
        dataset=dataset.path,
        method={values_of(method)},
        training=training,
        output=adapter.path,
        run_id=run_id,
        experiment=experiment,
    )
''',
    )
