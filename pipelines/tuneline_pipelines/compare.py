"""The pipeline `compare`: methods side by side on the same data and budget, to a leaderboard."""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false
from kfp import dsl

from tuneline.compare.component import check_compare, finetune_leg, leaderboard, measure_base
from tuneline.data_prep.component import prepare_data
from tuneline_pipelines.resources import Place


def build(place: Place, *, parallelism: int) -> dsl.base_component.BaseComponent:
    """The pipeline with each task placed by `place`.

    Args:
        place: gives a task what it needs.
        parallelism: legs at once; 0 for all, as far as the cluster has room.
    """

    @dsl.pipeline(
        name="compare",
        description="Train the same data with several methods, each with its own settings and the "
        "same budget, and order them. `methods`: names, or all. `compare`: settings of single "
        "legs, and further legs. The other parameters are the sections of a recipe.",
    )
    def pipeline(
        base_model: str,
        data: dict,
        methods: list = ["all"],  # noqa: B006  KFP writes it into the package
        method: dict = {"name": "lora"},  # noqa: B006
        training: dict = {},  # noqa: B006
        evaluation: dict = {},  # noqa: B006
        gate: dict = {},  # noqa: B006
        compare: dict = {},  # noqa: B006
        experiment: str = "tuneline",
    ) -> dsl.Artifact:
        run = {"run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER, "experiment": experiment}
        shared = {**run, "base_model": base_model}
        checked = check_compare(
            **shared,
            data=data,
            methods=methods,
            method=method,
            training=training,
            evaluation=evaluation,
            gate=gate,
            compare=compare,
        )
        prepared = prepare_data(**shared, data=data).after(checked)
        measured = measure_base(
            **shared, dataset=prepared.outputs["dataset"], evaluation=evaluation
        )
        with dsl.ParallelFor(checked.output, name="legs", parallelism=parallelism) as leg:
            tuned = finetune_leg(
                **shared,
                leg=leg,
                dataset=prepared.outputs["dataset"],
                base_scores=measured.outputs["base_scores"],
                evaluation=evaluation,
                gate=gate,
            )
        ranked = leaderboard(**run, rows=dsl.Collected(tuned.outputs["Output"]))
        for task in (checked, prepared, measured, tuned, ranked):
            place(task)
            task.set_caching_options(False)  # a hit would leave this run without its run tree
        return ranked.outputs["board"]

    return pipeline
