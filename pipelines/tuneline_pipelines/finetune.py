"""The pipeline `finetune`: raw rows to a promoted model, compiled for the cluster or run locally.

One function for both; the only difference is how its tasks are placed.
"""

# KFP types a component as the plain function that it decorates
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
from typing import NamedTuple

from kfp import dsl

from tuneline.component import check_recipe
from tuneline.data_prep.component import prepare_data
from tuneline.evaluate.component import evaluate
from tuneline.finetune.component import finetune_lora
from tuneline.merge.component import merge
from tuneline.register.component import promote, register
from tuneline_pipelines.resources import Place


class Outputs(NamedTuple):
    """What a finished run leaves."""

    adapter: dsl.Model
    model: dsl.Model
    eval_report: dsl.Artifact
    version: int
    alias: str


def build(place: Place) -> dsl.base_component.BaseComponent:
    """The pipeline with each task placed by `place`."""

    @dsl.pipeline(
        name="finetune",
        description="Prepare data, fine-tune with LoRA, evaluate base against tuned, merge, "
        "register, promote if the gate passes.",
    )
    def finetune(
        base_model: str,
        data: dict,
        registry: dict,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list = ["q_proj", "v_proj"],  # noqa: B006  KFP reads defaults into the spec
        layers: list = [],  # noqa: B006
        use_rslora: bool = False,
        use_dora: bool = False,
        init_weights: str = "zero",
        lora_plus_ratio: float = 1.0,
        training: dict = {},  # noqa: B006
        evaluation: dict = {},  # noqa: B006
        gate: dict = {},  # noqa: B006
        experiment: str = "tuneline",
    ) -> Outputs:
        """The parameters are the sections of a recipe; the method's hyperparameters are typed."""
        run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        method = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "layers": layers,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "init_weights": init_weights,
            "lora_plus_ratio": lora_plus_ratio,
        }
        checked = check_recipe(
            run_id=run_id,
            base_model=base_model,
            data=data,
            method="lora",
            **method,
            training=training,
            evaluation=evaluation,
            gate=gate,
            registry=registry,
            experiment=experiment,
        )
        prepared = prepare_data(
            run_id=run_id, experiment=experiment, base_model=base_model, data=data
        ).after(checked)
        tuned = finetune_lora(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            dataset=prepared.outputs["dataset"],
            **method,
            training=training,
        )
        evaluated = evaluate(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            adapter=tuned.outputs["adapter"],
            dataset=prepared.outputs["dataset"],
            evaluation=evaluation,
            gate=gate,
        )
        # merging waits for the evaluation: a model is never registered before it is evaluated
        merged = merge(
            run_id=run_id,
            experiment=experiment,
            base_model=base_model,
            adapter=tuned.outputs["adapter"],
        ).after(evaluated)
        registered = register(
            run_id=run_id,
            experiment=experiment,
            model=merged.outputs["model"],
            eval_report=evaluated.outputs["eval_report"],
            registry=registry,
        )
        promoted = promote(
            run_id=run_id, experiment=experiment, registry=registry, version=registered.output
        )
        for task in (checked, prepared, tuned, evaluated, merged, registered, promoted):
            place(task)
            # The run's id is an input of every task, so that no task could ever hit KFP's cache;
            # and a hit would leave this run without its run tree or its entry in the registry.
            task.set_caching_options(False)
        return Outputs(
            adapter=tuned.outputs["adapter"],
            model=merged.outputs["model"],
            eval_report=evaluated.outputs["eval_report"],
            version=registered.output,
            alias=promoted.output,
        )

    return finetune
