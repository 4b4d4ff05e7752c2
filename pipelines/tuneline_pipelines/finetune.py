"""The pipelines `finetune-METHOD`: raw rows to a promoted model, compiled for the cluster or run
locally.

One function for both places and for all methods: its signature is written from the method's
settings, so that the run form shows that method's own hyperparameters with their types.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
import inspect
from typing import Any, NamedTuple

from kfp import dsl

from tuneline.component import check_recipe
from tuneline.data_prep.component import prepare_data
from tuneline.evaluate.component import evaluate
from tuneline.finetune.component import finetune
from tuneline.finetune.methods import Method
from tuneline.generated import parameters_of
from tuneline.merge.component import merge
from tuneline.register.component import promote, register
from tuneline_pipelines.resources import Place


class Outputs(NamedTuple):
    """What a finished run leaves."""

    adapter: dsl.Model
    model: dsl.Model
    eval_report: dsl.Artifact
    version: int
    alias: str


def build(place: Place, method: Method) -> dsl.base_component.BaseComponent:
    """The pipeline of one method with each task placed by `place`.

    Args:
        place: gives a task what it needs.
        method: whose hyperparameters become parameters.
    """
    check_recipe_of_method, finetune_with_method = check_recipe(method), finetune(method)
    hyperparameters = [parameter.name for parameter in parameters_of(method)]

    def run(**given: Any) -> Outputs:
        run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        base_model, experiment = given["base_model"], given["experiment"]
        typed = {name: given[name] for name in hyperparameters}
        checked = check_recipe_of_method(run_id=run_id, **given)
        prepared = prepare_data(
            run_id=run_id, experiment=experiment, base_model=base_model, data=given["data"]
        ).after(checked)
        tuned = finetune_with_method(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            dataset=prepared.outputs["dataset"],
            **typed,
            training=given["training"],
        )
        evaluated = evaluate(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            adapter=tuned.outputs["adapter"],
            dataset=prepared.outputs["dataset"],
            evaluation=given["evaluation"],
            gate=given["gate"],
            registry=given["registry"],
        )
        # merging takes the report: a model is never registered before it is evaluated
        merged = merge(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            adapter=tuned.outputs["adapter"],
            dataset=prepared.outputs["dataset"],
            eval_report=evaluated.outputs["eval_report"],
            export=given["export"],
        )
        registered = register(
            run_id=run_id,
            experiment=experiment,
            model=merged.outputs["model"],
            eval_report=evaluated.outputs["eval_report"],
            registry=given["registry"],
        )
        promoted = promote(
            run_id=run_id,
            experiment=experiment,
            registry=given["registry"],
            version=registered.output,
        )
        for task in (checked, prepared, tuned, evaluated, merged, registered, promoted):
            place(task)
            # The run's id is an input of every task, so that no task could ever hit KFP's cache;
            # and a hit would leave this run without its run tree or its entry in the registry.
            task.set_caching_options(False)
        return Outputs(
            adapter=tuned.outputs["adapter"],
            model=merged.outputs["model"],
            eval_report=evaluated.outputs["eval_report"],
            version=registered.output,
            alias=promoted.output,
        )

    signature = _signature(method)

    def pipeline(*values: Any) -> Outputs:
        return run(**dict(zip(signature.parameters, values, strict=True)))

    # KFP reads the inputs from the signature and hands the values over in its order
    pipeline.__signature__ = signature
    return dsl.pipeline(
        name=f"finetune-{method.name.replace('_', '-')}",
        description=f"{method.title}. Prepare data, fine-tune, evaluate base against tuned, "
        "export, register, promote if the gate passes. The parameters are the sections of a "
        "recipe; the method's hyperparameters are typed.",
    )(pipeline)


def _signature(method: Method) -> inspect.Signature:
    def parameter(name: str, annotation: type, default: Any = inspect.Parameter.empty) -> Any:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, kind, annotation=annotation, default=default)

    return inspect.Signature(
        [
            parameter("base_model", str),
            parameter("data", dict),
            parameter("registry", dict),
            *parameters_of(method),
            parameter("training", dict, {}),
            parameter("evaluation", dict, {}),
            parameter("gate", dict, {}),
            parameter("export", dict, {}),
            parameter("experiment", str, "tuneline"),
        ],
        return_annotation=Outputs,
    )
