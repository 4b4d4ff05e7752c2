"""The pipelines `finetune-METHOD`: raw rows to a promoted model, compiled for the cluster or run
locally.

One function for both places and for all methods: its signature is written from the method's
settings, so that the run form shows that method's own hyperparameters with their types. Every step
after the first reads what the first one has checked and resolved.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
import inspect
from typing import Any, NamedTuple

from kfp import dsl

from tuneline.component import check_recipe, resolve_pool
from tuneline.data_prep.component import prepare_data
from tuneline.evaluate.component import evaluate
from tuneline.finetune.component import finetune
from tuneline.finetune.methods import Method
from tuneline.form import fields, hyperparameters_of, parameter, shown_of
from tuneline.merge.component import merge
from tuneline.register.component import promote, register
from tuneline_pipelines.resources import RUN_CONFIG, Place, Pool


class Outputs(NamedTuple):
    """What a finished run leaves."""

    adapter: dsl.Model
    model: dsl.Model
    eval_report: dsl.Artifact
    version: int
    alias: str


def build(place: Place, method: Method, *, default_pool: str) -> dsl.base_component.BaseComponent:
    """The pipeline of one method with each task placed by `place`.

    Args:
        place: gives a task what it needs.
        method: whose hyperparameters become parameters.
        default_pool: of the run form.
    """
    check_recipe_of_method, finetune_with_method = check_recipe(method), finetune(method)
    hyperparameters = [parameter.name for parameter in hyperparameters_of(method)]

    def run(gpu_pool: str, experiment: str, **given: Any) -> Outputs:
        run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        checked = check_recipe_of_method(run_id=run_id, experiment=experiment, **given)
        pool = resolve_pool(run_id=run_id, experiment=experiment, gpu_pool=gpu_pool).after(checked)
        shared = {
            "run_id": run_id,
            "experiment": experiment,
            "base_model": checked.outputs["base_model"],
        }
        prepared = prepare_data(
            **shared,
            data=checked.outputs["data"],
            evaluation=checked.outputs["evaluation"],
            gate=checked.outputs["gate"],
            expected={},
        ).after(pool)
        tuned = finetune_with_method(
            **shared,
            dataset=prepared.outputs["dataset"],
            **{name: checked.outputs[name] for name in hyperparameters},
            training=checked.outputs["training"],
        )
        end = finish(
            place,
            pool.outputs,
            shared,
            prepared.outputs["dataset"],
            tuned.outputs["adapter"],
            {section: checked.outputs[section] for section in FINISHING_SECTIONS},
        )
        for task in (checked, pool, prepared):
            place(task)
        place(tuned, pool.outputs)
        return Outputs(adapter=tuned.outputs["adapter"], **end)

    parameters = [
        *fields("base_model", "train_data", "test_data", "model_name"),
        *shown_of(method),
        *fields("epochs"),
        parameter("learning_rate", float, method.learning_rate),
        *fields("precision", "gate_champion"),
        parameter("gpu_pool", str, default_pool),
        parameter("overrides", dict, {}),
        *fields("experiment"),
    ]
    signature = inspect.Signature(parameters, return_annotation=Outputs)

    def pipeline(*values: Any) -> Outputs:
        return run(**dict(zip(signature.parameters, values, strict=True)))

    # KFP reads the inputs from the signature and hands the values over in its order
    pipeline.__signature__ = signature
    return dsl.pipeline(
        name=f"finetune-{method.name.replace('_', '-')}",
        description=f"{method.title}. Checks the recipe, prepares the data, fine-tunes on "
        f"gpu_pool, "
        "evaluates base against tuned and the current champion, exports, registers in MLflow, and "
        "promotes if the gate passes. train_data and test_data: file, folder or glob on the model "
        "cache's volume, hf://org/name@commit, s3:// or gs://; without test_data a part of the "
        "training rows is held out. overrides: any other setting, as a part of a recipe, for "
        'example {"gate": {"metric": "rouge_l"}, "training": {"seed": 7}}.'
        + _hidden_hyperparameters(method),
        pipeline_config=RUN_CONFIG,
    )(pipeline)


def _hidden_hyperparameters(method: Method) -> str:
    shown = {found.name for found in shown_of(method)}
    hidden = [found.name for found in hyperparameters_of(method) if found.name not in shown]
    return f" Its method section also takes {', '.join(hidden)}." if hidden else ""


FINISHING_SECTIONS = ("evaluation", "gate", "export", "registry")
"""What `finish` needs of a recipe."""


def finish(
    place: Place,
    pool: Pool,
    shared: dict[str, Any],
    dataset: Any,
    adapter: Any,
    sections: dict[str, Any],
    retrain_key: Any = "",
) -> dict[str, Any]:
    """The tasks after training: evaluate, merge, register, promote.

    Args:
        place: gives a task what it needs.
        pool: where the evaluation runs.
        shared: run_id, experiment and base_model.
        dataset: the PreparedDataset.
        adapter: what was trained.
        sections: FINISHING_SECTIONS of the recipe.
        retrain_key: content key of a retraining.

    Returns:
        The model, its report, the registered version and the alias.
    """
    run = {name: shared[name] for name in ("run_id", "experiment")}
    evaluated = evaluate(
        **shared,
        adapter=adapter,
        dataset=dataset,
        evaluation=sections["evaluation"],
        gate=sections["gate"],
        registry=sections["registry"],
    )
    # merging takes the report: a model is never registered before it is evaluated
    merged = merge(
        **shared,
        adapter=adapter,
        dataset=dataset,
        eval_report=evaluated.outputs["eval_report"],
        export=sections["export"],
    )
    registered = register(
        **run,
        retrain_key=retrain_key,
        model=merged.outputs["model"],
        eval_report=evaluated.outputs["eval_report"],
        registry=sections["registry"],
    )
    promoted = promote(**run, registry=sections["registry"], version=registered.output)
    place(evaluated, pool)
    for task in (merged, registered, promoted):
        place(task)
    return {
        "model": merged.outputs["model"],
        "eval_report": evaluated.outputs["eval_report"],
        "version": registered.output,
        "alias": promoted.output,
    }
