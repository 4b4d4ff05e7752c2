"""KFP components: MergedModel + EvalReport -> registered version -> champion."""

from kfp import dsl

from tuneline.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def register(
    run_id: str,
    experiment: str,
    model: dsl.Input[dsl.Model],
    eval_report: dsl.Input[dsl.Artifact],
    registry: dict,
    retrain_key: str,
) -> int:
    """Register the model once per pipeline run or retraining; returns the version."""
    from tuneline import steps

    return steps.guard(
        steps.register,
        model=model.path,
        eval_report=eval_report.path,
        registry=registry,
        retrain_key=retrain_key,
        run_id=run_id,
        experiment=experiment,
    )


@dsl.component(base_image=CPU, install_kfp_package=False)
def promote(run_id: str, experiment: str, registry: dict, version: int) -> str:
    """Make the version champion if its gate passed; returns the alias, empty when refused."""
    from tuneline import steps

    return steps.guard(
        steps.promote,
        registry=registry,
        version=version,
        run_id=run_id,
        experiment=experiment,
    )


@dsl.component(base_image=CPU, install_kfp_package=False)
def promote_version(
    run_id: str, experiment: str, model_name: str, version: int, copy_to_model: str
) -> str:
    """Make a version of any run champion if it may be; returns the alias, empty when refused."""
    from tuneline import steps

    return steps.guard(
        steps.promote,
        registry={
            "model_name": model_name,
            **({"to_model": copy_to_model} if copy_to_model else {}),
        },
        version=version,
        run_id=run_id,
        experiment=experiment,
    )
