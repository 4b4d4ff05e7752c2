"""KFP component: raw rows -> PreparedDataset."""

from typing import Optional

from kfp import dsl

from tuneline.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def prepare_data(
    run_id: str,
    experiment: str,
    base_model: str,
    data: dict,
    expected: dict,
    dataset: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    evaluation: Optional[dict] = None,
    gate: Optional[dict] = None,
):
    """Check, render, tokenize, mask and split the rows for one base model and its evaluation.

    expected: what check_retrain has decided on; empty for any data.
    """
    import shutil
    from pathlib import Path

    from tuneline import steps

    steps.guard(
        steps.prepare_data,
        base_model=base_model,
        data=data,
        evaluation=evaluation,
        gate=gate,
        expected=expected,
        output=dataset.path,
        run_id=run_id,
        experiment=experiment,
    )
    shutil.copyfile(Path(dataset.path) / "contract.html", page.path)
