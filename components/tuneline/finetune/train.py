"""PreparedDataset -> Adapter: `transformers.Trainer` with our batches and our loss."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import ArtifactError, ModelError, TrainingError
from tuneline.finetune.methods import METHODS, Method
from tuneline.progress import report
from tuneline.recipe import TrainingSection
from tuneline.settings import Settings
from tuneline.tracking import Step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

HISTORY = "history.jsonl"


def finetune(
    model_reference: str,
    dataset_dir: Path,
    method_config: Settings,
    training: TrainingSection,
    output: Path,
    step: Step,
) -> Artifact:
    """Train one adapter.

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
        TrainingError: the loss is not finite.
    """
    dataset = artifacts.load(dataset_dir, "prepared_dataset")
    base = base_model.resolve(model_reference)
    if dataset.manifest.base_model["digest"] != base.digest:
        raise ArtifactError(
            f"{dataset_dir} was prepared for {dataset.manifest.base_model['reference']} "
            f"({dataset.manifest.base_model['digest'][:19]}), not for {base.reference} "
            f"({base.digest[:19]}): prepare the data again"
        )
    method = _method_of(method_config)
    with artifacts.writing(output) as aside:
        history = _train(base, dataset, method, method_config, training, aside, step)
        with (aside / HISTORY).open("w", encoding="utf-8") as file:
            for entry in history:
                file.write(json.dumps(entry) + "\n")
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
    return artifacts.load(output, "adapter")


def _method_of(config: Settings) -> Method:
    return next(method for method in METHODS if isinstance(config, method.config_class))


def load_base(path: Path) -> PreTrainedModel:
    """The base model in fp32 on CPU, in its own dtype on the first accelerator.

    Raises:
        ModelError: configuration or weights can't be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    accelerated = torch.cuda.is_available()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            # bf16 arithmetic is several times slower than fp32 on CPUs without bf16 units
            dtype="auto" if accelerated else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{path} can't be loaded as a causal language model: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}"
        ) from error
    return model.to(torch.device("cuda")) if accelerated else model  # pyright: ignore[reportArgumentType]


def _train(
    base: BaseModel,
    dataset: Artifact,
    method: Method,
    method_config: Settings,
    training: TrainingSection,
    output: Path,
    step: Step,
) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer, TrainingArguments, set_seed

    from tuneline.finetune.batching import batches_of
    from tuneline.finetune.trainer import ProgressCallback, SupervisedTrainer

    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    set_seed(training.seed)
    frozen = load_base(base.path)
    all_parameters = sum(p.numel() for p in frozen.parameters())
    model = method.attach(frozen, method_config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report(
        f"{method.name}: {trainable:,} trainable of {all_parameters:,} parameters "
        f"({trainable / all_parameters:.2%})"
    )
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    loaders = {
        split: batches_of(
            dataset,
            split,
            batch_tokens=training.batch_tokens,
            pad_token_id=pad_token_id,
            seed=training.seed if split == "train" else None,
        )
        for split in ("train", "validation")
        if dataset.read_json("contract.json")["splits"][split]["rows"]
    }
    steps_per_epoch = math.ceil(len(loaders["train"]) / training.gradient_accumulation_steps)
    steps = max(1, math.ceil(steps_per_epoch * training.epochs))
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule
        if training.warmup_fraction == 0 or training.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=int(training.warmup_fraction * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        eval_strategy="steps" if "validation" in loaders else "no",
        eval_steps=max(1, math.ceil(steps / training.evaluations)),
        logging_steps=min(math.ceil(steps / 40), 50),
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    step.log_params(
        {
            **method_config.model_dump(mode="json"),
            **training.model_dump(mode="json"),
            "trainable_parameters": trainable,
            "trainable_fraction": trainable / all_parameters,
            "optimizer_steps": steps,
        }
    )
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_loader=loaders["train"],
        validation_loader=loaders.get("validation"),
        create_optimizer=partial(method.create_optimizer, model, method_config),
    )
    trainer.add_callback(ProgressCallback(step, trainer))
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    report(
        f"trained {trainer.tokens_seen:,} tokens in {seconds:.0f} s "
        f"({trainer.tokens_seen / seconds:.0f} tokens/s), {steps} steps"
    )
    if "validation" in loaders:
        _evaluate_at_end(trainer, steps)
    _save(model, method, base, output)
    return trainer.state.log_history


def _evaluate_at_end(trainer: Any, steps: int) -> None:
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluated or evaluated[-1] != steps:
        trainer.evaluate()


def _save(model: PeftModel, method: Method, base: BaseModel, output: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise TrainingError(
                f"{name} is not finite after training: lower training.learning_rate"
            )
    method.save(model, str(output))
    # peft looks the base up where it lies; that place says nothing on another machine
    path = output / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.name, "revision": base.revision or None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (output / "README.md").unlink(missing_ok=True)  # peft's blank model card
    trainer_folder = output / "trainer"
    if trainer_folder.is_dir():
        trainer_folder.rmdir()
