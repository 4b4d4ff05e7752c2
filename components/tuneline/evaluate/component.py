"""KFP component: Adapter + PreparedDataset + champion -> EvalReport with the gate's verdict."""

from kfp import dsl

from tuneline.images import GPU


@dsl.component(base_image=GPU, install_kfp_package=False)
def evaluate(
    run_id: str,
    experiment: str,
    base_model: str,
    adapter: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dict,
    gate: dict,
    registry: dict,
    eval_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
):
    """Measure base, tuned model and champion on the same rows, compare them, and decide."""
    import shutil
    from pathlib import Path

    from tuneline import steps

    result = steps.guard(
        steps.evaluate,
        base_model=base_model,
        adapter=adapter.path,
        dataset=dataset.path,
        evaluation=evaluation,
        gate=gate,
        output=eval_report.path,
        run_id=run_id,
        experiment=experiment,
        champion_of=registry["model_name"],
    )
    for name, block in result["metrics"].items():
        for model in ("base", "tuned", "champion"):
            if model in block and block[model]["score"] is not None:
                metrics.log_metric(f"{model}_{name}", block[model]["score"])
    metrics.log_metric("test_rows", result["rows"])
    shutil.copyfile(Path(eval_report.path) / "report.html", page.path)
