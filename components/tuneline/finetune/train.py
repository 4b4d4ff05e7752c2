"""PreparedDataset -> Adapter: `transformers.Trainer` with our batches and our loss."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import ArtifactError, MethodError, Terminated, TrainingError
from tuneline.finetune.load import compute_dtype, load_base, load_skeleton, parameter_count
from tuneline.finetune.methods import Method
from tuneline.finetune.methods.method import MethodSettings
from tuneline.progress import ranks, report
from tuneline.recipe import TrainingSection, method_of, with_learning_rate
from tuneline.termination import deferred
from tuneline.tracking import Step, Untracked

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from tuneline.finetune.checkpoint import Checkpoints

HISTORY = "history.jsonl"


def finetune(
    model_reference: str,
    dataset_dir: Path,
    method_config: MethodSettings,
    training: TrainingSection,
    output: Path,
    step: Step,
) -> Artifact:
    """Train one adapter; under torchrun in the first process, beside `accompany` in the others.

    Args:
        model_reference: the base model that the data set was prepared for.
        dataset_dir: a PreparedDataset.
        method_config: of the method, as `recipe.method_settings` gives it.
        training: the loop's settings.
        output: folder of the Adapter.
        step: where parameters and metrics are tracked.

    Raises:
        ArtifactError: the data set was prepared for another model.
        MethodError: the method's options don't fit the model.
        TrainingError: the loss is not finite, memory or disk is full.
        StorageError: `TUNELINE_CHECKPOINTS` names an object store that can't be used.
        Terminated: SIGTERM arrived while training; a checkpoint was written.
    """
    from tuneline.finetune.checkpoint import checkpoints_of, run_identity

    base, dataset = _inputs(model_reference, dataset_dir)
    method = method_of(method_config)
    training = with_learning_rate(training, method)
    identity = run_identity(base.digest, dataset.digest, method_config, training)
    with checkpoints_of(identity, output, limit=training.save_total_limit) as checkpoints:
        with artifacts.writing(output) as aside:
            with _saying_where_it_goes_on(checkpoints):
                history = _train(
                    base, dataset, method, method_config, training, aside, step, checkpoints
                )
            with (aside / HISTORY).open("w", encoding="utf-8") as file:
                for entry in history:
                    # sorted, as a resumed run's come back: the same run is the same artifact
                    file.write(json.dumps(entry, sort_keys=True) + "\n")
            artifacts.seal(
                aside,
                kind="adapter",
                config={
                    "method": method_config.model_dump(mode="json"),
                    "training": training.model_dump(mode="json"),
                },
                base_model=base.identity(),
                inputs={"prepared_dataset": dataset.digest},
            )
        adapter = artifacts.load(output, "adapter")
        # while they are locked: a second process that waits for them must not get them first
        if not training.keep_checkpoints:
            checkpoints.discard()
        return adapter


@contextmanager
def _saying_where_it_goes_on(checkpoints: Checkpoints) -> Iterator[None]:
    """SIGTERM outside of the loop, while loading or saving: what there is, is of earlier."""
    try:
        yield
    except Terminated as stopped:
        if str(stopped):
            raise
        raise Terminated(
            f"of its checkpoints {checkpoints.standing()}: run it again to go on"
        ) from stopped


def accompany(
    model_reference: str,
    dataset_dir: Path,
    method_config: MethodSettings,
    training: TrainingSection,
) -> None:
    """Train in one of torchrun's other processes: it computes, the first one writes."""
    from tuneline.finetune.checkpoint import checkpoints_of, run_identity

    base, dataset = _inputs(model_reference, dataset_dir)
    method = method_of(method_config)
    training = with_learning_rate(training, method)
    identity = run_identity(base.digest, dataset.digest, method_config, training)
    with tempfile.TemporaryDirectory() as nothing:
        output = Path(nothing) / "adapter"
        with checkpoints_of(identity, output, limit=1, own=False) as others:
            _train(base, dataset, method, method_config, training, output, Untracked(), others)


def _inputs(model_reference: str, dataset_dir: Path) -> tuple[BaseModel, Artifact]:
    dataset = artifacts.load(dataset_dir, "prepared_dataset")
    base = base_model.resolve(model_reference)
    if dataset.manifest.base_model["digest"] != base.digest:
        raise ArtifactError(
            f"{dataset_dir} was prepared for {dataset.manifest.base_model['reference']} "
            f"({dataset.manifest.base_model['digest'][:19]}), not for {base.reference} "
            f"({base.digest[:19]}): prepare the data again"
        )
    return base, dataset


def _train(
    base: BaseModel,
    dataset: Artifact,
    method: Method,
    method_config: MethodSettings,
    training: TrainingSection,
    output: Path,
    step: Step,
    checkpoints: Checkpoints,
) -> list[dict[str, Any]]:
    import torch
    from transformers import set_seed

    from tuneline.data_prep.chat import load_tokenizer
    from tuneline.finetune.arguments import (
        shards,
        training_arguments,
        training_dtype,
        use_kernels,
    )
    from tuneline.finetune.batching import batches_of
    from tuneline.finetune.checkpoint import Schedule, trainable
    from tuneline.finetune.memory import loading
    from tuneline.finetune.sharding import whole
    from tuneline.finetune.trainer import ProgressCallback, SupervisedTrainer

    _check_validation(dataset, training)
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: set "
            "CUDA_VISIBLE_DEVICES to one of them, or train with `tuneline finetune`, which starts "
            "a process for each"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, world_size = ranks()
    sharded = shards(training, method, processes=world_size)
    set_seed(training.seed)
    with loading(base.path):
        model, count, all_parameters = attach(
            base, method, method_config, precision=training.precision
        )
    layout = use_kernels(model, training)
    report(
        f"{method.name}: {count:,} trainable of {all_parameters:,} parameters "
        f"({count / all_parameters:.3%})"
        + (f", divided over {world_size} processes" if sharded else "")
    )
    tokenizer = load_tokenizer(str(base.path), trust_code=base.trusts_code)
    pad_token_id = tokenizer.pad_token_id
    assert training.learning_rate is not None
    loaders = {
        split: batches_of(
            dataset,
            split,
            batch_tokens=training.batch_tokens,
            pad_token_id=pad_token_id if isinstance(pad_token_id, int) else 0,
            seed=training.seed if split == "train" else None,
            layout=layout,
            rank=rank,
            world_size=world_size,
        )
        for split in ("train", "validation")
        if dataset.read_json("contract.json")["splits"][split]["rows"]
    }
    steps_per_epoch = math.ceil(len(loaders["train"]) / training.gradient_accumulation_steps)
    steps = max(1, math.ceil(steps_per_epoch * training.epochs))
    arguments = training_arguments(
        training,
        method,
        steps=steps,
        validates="validation" in loaders,
        output_dir=output / "trainer",
        sharded=sharded,
    )
    step.log_params(
        {
            **method_config.model_dump(mode="json"),
            **training.model_dump(mode="json"),
            "trainable_parameters": count,
            "trainable_fraction": count / all_parameters,
            "optimizer_steps": steps,
        }
    )
    with deferred() as termination:
        trainer = SupervisedTrainer(
            model=model,
            args=arguments,
            train_loader=loaders["train"],
            validation_loader=loaders.get("validation"),
            create_optimizer=partial(method.create_optimizer, model, method_config),
            checkpoints=checkpoints,
            schedule=Schedule(training.checkpoint_minutes),
            termination=termination,
            load_best=training.load_best,
            early_stopping_patience=training.early_stopping_patience,
            shard_in=training_dtype(training) if sharded else None,
        )
        trainer.add_callback(ProgressCallback(step, trainer))
        trainer.run()
    if trainer.any_rank(termination.requested):  # after the last look at it
        raise Terminated
    weights = whole(trainable(model), keep=rank == 0) if sharded else None
    if rank == 0:
        if weights is not None:
            model = _with_weights(base, method, method_config, weights)
        _save(model, method, base, output)
    return trainer.state.log_history


def _check_validation(dataset: Artifact, training: TrainingSection) -> None:
    if dataset.read_json("contract.json")["splits"]["validation"]["rows"]:
        return
    if training.load_best:
        what, instead = "load_best", "load_best: false and leave early_stopping_patience unset"
    elif training.schedule == "reduce_lr_on_plateau":
        what, instead = f"schedule {training.schedule}", "another schedule"
    else:
        return
    raise TrainingError(
        f"training.{what} needs validation rows, and the data set has none: raise "
        f"data.validation_fraction and prepare the data again, or set {instead}"
    )


def attach(
    base: BaseModel,
    method: Method,
    config: MethodSettings,
    *,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
) -> tuple[PeftModel | PreTrainedModel, int, int]:
    """The base in memory with the method on it.

    Args:
        base: resolved.
        method: to attach.
        config: of the method.
        precision: of the computation, as in the recipe.

    Returns:
        The model, the number of parameters that train, and the number that the base has.

    Raises:
        MethodError: the method's options don't fit the model, or nothing would train.
    """
    import torch

    in_fp32 = precision == "fp32" or compute_dtype() is torch.float32
    loaded = load_base(
        base.path,
        trust_code=base.trusts_code,
        quantization=config.quantization,
        # a step of 1e-5 of a weight is lost in bf16's 8 bits of mantissa: what trains is fp32, and
        # the arithmetic of an accelerator is bf16 by autocast
        dtype=torch.float32 if method.stored_as == "model" or in_fp32 else None,
    )
    total = parameter_count(loaded)
    model = method.attach(loaded, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise MethodError(f"{method.name}: no parameter of {type(loaded).__name__} would train")
    for parameter in trained:
        parameter.data = parameter.data.float()
    return model, sum(parameter.numel() for parameter in trained), total


def _with_weights(
    base: BaseModel, method: Method, config: MethodSettings, weights: Mapping[str, Tensor]
) -> PeftModel | PreTrainedModel:
    """A model in one piece, to save, from what was divided."""
    from torch.nn import Parameter

    skeleton = load_skeleton(base.path, trust_code=base.trusts_code)
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        skeleton.get_submodule(module).register_parameter(last, Parameter(weight))
    skeleton.tie_weights()
    return method.attach(skeleton, config)


def _save(
    model: PeftModel | PreTrainedModel, method: Method, base: BaseModel, output: Path
) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise TrainingError(
                f"{name} is not finite after training: lower training.learning_rate"
            )
    if method.stored_as == "model":
        dtype: torch.dtype = getattr(torch, base_model.stored_dtype(base.path))
        model.to(dtype)  # pyright: ignore[reportArgumentType]
        method.save(model, str(output))
        base_model.copy_small_files(base.path, output)
    else:
        method.save(model, str(output))
        _name_the_base(output, base)
    (output / "README.md").unlink(missing_ok=True)  # peft's blank model card
    trainer_folder = output / "trainer"
    if trainer_folder.is_dir():
        trainer_folder.rmdir()


def _name_the_base(output: Path, base: BaseModel) -> None:
    # peft looks the base up where it lies; that place says nothing on another machine
    path = output / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.name, "revision": base.revision or None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
