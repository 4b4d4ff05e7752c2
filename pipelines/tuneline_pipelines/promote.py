"""The pipeline `promote`: a version that is registered already becomes champion, if it may.

For versions that waited for `tuneline approve`, and for promotions by schedule or from the run
form. It is the last step of `finetune-METHOD`, by itself.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from kfp import dsl

from tuneline.form import DEFAULTS
from tuneline.register.component import promote_version
from tuneline_pipelines.resources import RUN_CONFIG, Place


def build(place: Place) -> dsl.base_component.BaseComponent:
    """The pipeline with its task placed by `place`."""

    @dsl.pipeline(
        name="promote",
        description="Checks a registered version's files, report, gate verdict and approval, loads "
        "the model, and makes it champion. copy_to_model: another registered model, as "
        "production.orders, that a new champion is copied to; empty: none. Needs no accelerator.",
        pipeline_config=RUN_CONFIG,
    )
    def promote(
        model_name: str = DEFAULTS["model_name"],
        version: int = 1,
        copy_to_model: str = "",
        experiment: str = DEFAULTS["experiment"],
    ) -> str:
        promoted = promote_version(
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            experiment=experiment,
            model_name=model_name,
            version=version,
            copy_to_model=copy_to_model,
        )
        place(promoted)
        return promoted.output

    return promote
