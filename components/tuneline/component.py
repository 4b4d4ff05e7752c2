"""KFP component: the recipe is checked as a whole, on a CPU node, before anything else runs."""

from kfp import dsl

from tuneline.images import TUNELINE


@dsl.component(base_image=TUNELINE, install_kfp_package=False)
def check_recipe(
    run_id: str,
    base_model: str,
    data: dict,
    method: str,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list,
    layers: list,
    use_rslora: bool,
    use_dora: bool,
    init_weights: str,
    lora_plus_ratio: float,
    training: dict,
    evaluation: dict,
    gate: dict,
    registry: dict,
    experiment: str,
) -> dict:
    """Fail with every fault of the recipe, or return it with all defaults filled in."""
    from tuneline import steps

    return steps.guard(
        steps.check_recipe,
        base_model=base_model,
        sections={
            "data": data,
            "method": {
                "name": method,
                "rank": rank,
                "alpha": alpha,
                "dropout": dropout,
                "target_modules": target_modules,
                "layers": layers,
                "use_rslora": use_rslora,
                "use_dora": use_dora,
                "init_weights": init_weights,
                "lora_plus_ratio": lora_plus_ratio,
            },
            "training": training,
            "evaluation": evaluation,
            "gate": gate,
            "registry": {**registry, "experiment": experiment},
        },
        run_id=run_id,
        experiment=experiment,
    )
