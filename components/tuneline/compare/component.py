"""KFP components of a comparison: check -> legs -> leaderboard."""

# KFP ships a function alone, so the type of several outputs has to stand in its annotation
# pyright: reportInvalidTypeForm=false
from typing import List, NamedTuple  # noqa: UP035  KFP reads the elements' type from this form

from kfp import dsl

from tuneline.images import CPU, GPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def check_compare(
    run_id: str,
    base_model: str,
    train_data: str,
    test_data: str,
    methods: list,
    epochs: float,
    precision: str,
    overrides: dict,
    experiment: str,
) -> NamedTuple(
    "Resolved",
    [
        ("base_model", str),
        ("data", dict),
        ("evaluation", dict),
        ("gate", dict),
        ("Output", List[dict]),  # noqa: UP006  the legs: kfp.local loops over no other name
    ],
):
    """Fail with every fault of the recipe and its legs, or return the legs."""
    from tuneline import steps

    return steps.guard(
        steps.check_compare,
        values={
            "base_model": base_model,
            "train_data": train_data,
            "test_data": test_data,
            "epochs": epochs,
            "precision": precision,
            "experiment": experiment,
        },
        methods=methods,
        overrides=overrides,
        run_id=run_id,
        experiment=experiment,
    )


@dsl.component(base_image=GPU, install_kfp_package=False)
def measure_base(
    run_id: str,
    experiment: str,
    base_model: str,
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dict,
    base_scores: dsl.Output[dsl.Artifact],
):
    """Answer the test split with the base once, for all legs."""
    from tuneline import steps

    steps.guard(
        steps.measure_base,
        base_model=base_model,
        dataset=dataset.path,
        evaluation=evaluation,
        output=base_scores.path,
        run_id=run_id,
        experiment=experiment,
    )


@dsl.component(base_image=GPU, install_kfp_package=False)
def finetune_leg(
    run_id: str,
    experiment: str,
    leg: dict,
    dataset: dsl.Input[dsl.Dataset],
    base_scores: dsl.Input[dsl.Artifact],
    adapter: dsl.Output[dsl.Model],
    eval_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> dict:
    """Train and evaluate one leg; a leg that fails ends well and says why in its row."""
    from tuneline import steps

    row = steps.guard(
        steps.compare_leg,
        leg=leg,
        base_model=leg["base_model"],
        dataset=dataset.path,
        base_scores=base_scores.path,
        evaluation=leg["evaluation"],
        gate=leg["gate"],
        adapter=adapter.path,
        eval_report=eval_report.path,
        run_id=run_id,
        experiment=experiment,
    )
    for name, value in row.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, float(value))
    return row


@dsl.component(base_image=CPU, install_kfp_package=False)
def leaderboard(
    run_id: str,
    experiment: str,
    rows: List[dict],  # noqa: UP006
    board: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
):
    """Order the legs, and show them."""
    import shutil
    from pathlib import Path

    from tuneline import steps

    content = steps.guard(
        steps.leaderboard,
        rows=rows,
        output=board.path,
        run_id=run_id,
        experiment=experiment,
    )
    for row in content["legs"]:
        if "score" in row:
            metrics.log_metric(f"{row['leg']}_{row['metric']}", row["score"])
    shutil.copyfile(Path(board.path) / "leaderboard.html", page.path)
