"""The pipeline `promote`: a version that is registered already becomes champion, if it may.

For versions that waited for `tuneline approve`, and for promotions by schedule or from the run
form. It is the last step of `finetune-METHOD`, by itself.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from kfp import dsl

from tuneline.register.component import promote as promote_version
from tuneline_pipelines.resources import Place


def build(place: Place) -> dsl.base_component.BaseComponent:
    """The pipeline with its task placed by `place`."""

    @dsl.pipeline(
        name="promote",
        description="Check a registered version's files, report, gate verdict and approval, load "
        "the model, and make it champion. `registry` holds model_name, and to_model to copy it to.",
    )
    def promote(registry: dict, version: int, experiment: str = "tuneline") -> str:
        promoted = promote_version(
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            experiment=experiment,
            registry=registry,
            version=version,
        )
        place(promoted)
        promoted.set_caching_options(False)
        return promoted.output

    return promote
