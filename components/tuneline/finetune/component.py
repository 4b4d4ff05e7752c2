"""KFP components: PreparedDataset -> Adapter, one per method with that method's parameters."""

from kfp import dsl

from tuneline.images import TUNELINE


@dsl.component(base_image=TUNELINE, install_kfp_package=False)
def finetune_lora(
    run_id: str,
    experiment: str,
    base_model: str,
    dataset: dsl.Input[dsl.Dataset],
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
    adapter: dsl.Output[dsl.Model],
):
    """Train a LoRA adapter."""
    from tuneline import steps

    steps.guard(
        steps.finetune,
        base_model=base_model,
        dataset=dataset.path,
        method={
            "name": "lora",
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
        training=training,
        output=adapter.path,
        run_id=run_id,
        experiment=experiment,
    )
