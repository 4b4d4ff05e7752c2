"""KFP component: base + Adapter -> MergedModel, or a package of both where it can't be merged."""

from kfp import dsl

from tuneline.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def merge(
    run_id: str,
    experiment: str,
    base_model: str,
    adapter: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    eval_report: dsl.Input[dsl.Artifact],
    export: dict,
    model: dsl.Output[dsl.Model],
    card: dsl.Output[dsl.Markdown],
):
    """Merge the adapter into the base's weights and prove that nothing was lost."""
    import shutil
    from pathlib import Path

    from tuneline import steps

    steps.guard(
        steps.merge,
        base_model=base_model,
        adapter=adapter.path,
        dataset=dataset.path,
        eval_report=eval_report.path,
        export=export,
        output=model.path,
        run_id=run_id,
        experiment=experiment,
    )
    shutil.copyfile(Path(model.path) / "README.md", card.path)
