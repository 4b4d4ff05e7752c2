"""The pipeline `retrain`, for schedules: trains when there is something new, and only once.

The first step runs on a CPU node and decides by content; a run that finds nothing to do ends there.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
from typing import NamedTuple

from kfp import dsl

from tuneline.component import resolve_pool
from tuneline.data_prep.component import prepare_data
from tuneline.finetune.component import finetune_chosen
from tuneline.form import DEFAULTS
from tuneline.register.component import promote
from tuneline.retrain.component import check_retrain
from tuneline_pipelines.finetune import FINISHING_SECTIONS, finish
from tuneline_pipelines.resources import RUN_CONFIG, Place


class Outputs(NamedTuple):
    """What a finished run says. What it made is in the registry: a condition has no outputs."""

    action: str
    reason: str
    key: str
    version: int


def build(place: Place, *, default_pool: str) -> dsl.base_component.BaseComponent:
    """The pipeline with each task placed by `place`.

    Args:
        place: gives a task what it needs.
        default_pool: of the run form.
    """

    @dsl.pipeline(
        name="retrain",
        description="For schedules. Looks whether data, recipe, base model or image changed since "
        "model_name was last retrained; if nothing did, the run ends green on a CPU node within "
        "seconds. Else it fine-tunes on gpu_pool, evaluates against the current champion, "
        "registers "
        "one version for this state of things, and promotes it if the gate passes. Runs that "
        "overlap do the work once. overrides: any other setting, as a part of a recipe, for "
        "example "
        '{"retrain": {"min_new_rows": 1000}, "method": {"rank": 16}}.',
        pipeline_config=RUN_CONFIG,
    )
    def pipeline(
        base_model: str = DEFAULTS["base_model"],
        train_data: str = DEFAULTS["train_data"],
        test_data: str = DEFAULTS["test_data"],
        model_name: str = DEFAULTS["model_name"],
        method: str = "lora",
        epochs: float = DEFAULTS["epochs"],
        learning_rate: float = DEFAULTS["learning_rate"],
        precision: str = DEFAULTS["precision"],
        gate_champion: str = DEFAULTS["gate_champion"],
        gpu_pool: str = default_pool,
        overrides: dict = {},  # noqa: B006  KFP writes it into the package
        experiment: str = DEFAULTS["experiment"],
    ) -> Outputs:
        run = {"run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER, "experiment": experiment}
        decided = check_retrain(
            **run,
            base_model=base_model,
            train_data=train_data,
            test_data=test_data,
            model_name=model_name,
            method=method,
            epochs=epochs,
            learning_rate=learning_rate,
            precision=precision,
            gate_champion=gate_champion,
            overrides=overrides,
        )
        place(decided)
        found = decided.outputs
        shared = {**run, "base_model": found["base_model"]}
        with dsl.If(found["Output"] == "train", name="train"):
            pool = resolve_pool(**run, gpu_pool=gpu_pool)
            prepared = prepare_data(
                **shared,
                data=found["data"],
                evaluation=found["evaluation"],
                gate=found["gate"],
                expected=found["expected"],
            ).after(pool)
            tuned = finetune_chosen(
                **shared,
                dataset=prepared.outputs["dataset"],
                method=found["method"],
                training=found["training"],
            )
            finish(
                place,
                pool.outputs,
                shared,
                prepared.outputs["dataset"],
                tuned.outputs["adapter"],
                {section: found[section] for section in FINISHING_SECTIONS},
                found["key"],
            )
            for task in (pool, prepared):
                place(task)
            place(tuned, pool.outputs)
        with dsl.If(found["Output"] == "promote", name="promote-what-was-made"):
            promoted = promote(**run, registry=found["registry"], version=found["version"])
            place(promoted)
        return Outputs(
            action=found["Output"],
            reason=found["reason"],
            key=found["key"],
            version=found["version"],
        )

    return pipeline
