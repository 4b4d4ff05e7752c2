"""The pipeline `compare`: methods side by side on the same data and budget, to a leaderboard."""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false
from kfp import dsl

from tuneline.compare.component import check_compare, finetune_leg, leaderboard, measure_base
from tuneline.component import resolve_pool
from tuneline.data_prep.component import prepare_data
from tuneline.form import DEFAULTS
from tuneline_pipelines.resources import RUN_CONFIG, Place


def build(place: Place, *, parallelism: int, default_pool: str) -> dsl.base_component.BaseComponent:
    """The pipeline with each task placed by `place`.

    Args:
        place: gives a task what it needs.
        parallelism: legs at once; 0 for all, as far as the cluster has room.
        default_pool: of the run form.
    """

    @dsl.pipeline(
        name="compare",
        description="Trains the same data with several methods on gpu_pool, each with its own "
        "settings and the same budget, and orders them; nothing is registered. methods: names, or "
        "all. overrides: any other setting, as a part of a recipe; its section compare holds "
        'settings of single legs and further legs, for example {"compare": {"lora-r64": {"method": '
        '"lora", "rank": 64}}}.',
        pipeline_config=RUN_CONFIG,
    )
    def pipeline(
        base_model: str = DEFAULTS["base_model"],
        train_data: str = DEFAULTS["train_data"],
        test_data: str = DEFAULTS["test_data"],
        methods: list = ["all"],  # noqa: B006  KFP writes it into the package
        epochs: float = DEFAULTS["epochs"],
        precision: str = DEFAULTS["precision"],
        gpu_pool: str = default_pool,
        overrides: dict = {},  # noqa: B006
        experiment: str = DEFAULTS["experiment"],
    ) -> dsl.Artifact:
        run = {"run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER, "experiment": experiment}
        checked = check_compare(
            **run,
            base_model=base_model,
            train_data=train_data,
            test_data=test_data,
            methods=methods,
            epochs=epochs,
            precision=precision,
            overrides=overrides,
        )
        pool = resolve_pool(**run, gpu_pool=gpu_pool).after(checked)
        shared = {**run, "base_model": checked.outputs["base_model"]}
        prepared = prepare_data(
            **shared,
            data=checked.outputs["data"],
            evaluation=checked.outputs["evaluation"],
            gate=checked.outputs["gate"],
            expected={},
        ).after(pool)
        measured = measure_base(
            **shared, dataset=prepared.outputs["dataset"], evaluation=checked.outputs["evaluation"]
        )
        with dsl.ParallelFor(
            checked.outputs["Output"], name="legs", parallelism=parallelism
        ) as leg:
            tuned = finetune_leg(
                **run,
                leg=leg,
                dataset=prepared.outputs["dataset"],
                base_scores=measured.outputs["base_scores"],
            )
            place(tuned, pool.outputs)
        ranked = leaderboard(**run, rows=dsl.Collected(tuned.outputs["Output"]))
        place(measured, pool.outputs)
        for task in (checked, pool, prepared, ranked):
            place(task)
        return ranked.outputs["board"]

    return pipeline
