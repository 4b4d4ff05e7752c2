"""The recipe: what to tune, on what, how, and what has to be true before it is promoted.

A YAML file, `--set section.key=value` and the parameters of a KFP run are three ways to fill the
same sections. `resolve` checks all of them at once and reports every fault, each with what is
allowed; nothing asks for an accelerator before that. The resolved recipe is a plain JSON value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, Union, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from tuneline.errors import RecipeError, did_you_mean
from tuneline.evaluate.forgetting import GENERAL
from tuneline.evaluate.metrics import METRICS, unknown_metric
from tuneline.finetune.methods import METHODS
from tuneline.finetune.methods.lora import LoraSettings
from tuneline.finetune.methods.method import Method, MethodSettings
from tuneline.settings import Settings

if TYPE_CHECKING:
    AnyMethod = MethodSettings
else:
    AnyMethod = Annotated[
        Union[tuple(method.config_class for method in METHODS)],  # noqa: UP007  a computed union
        Field(discriminator="name"),
    ]

T = TypeVar("T", bound=Settings)
HISTORY_SUFFIX: Final = ".history"
"""The registered model `NAME.history` holds what was done to the model `NAME`."""
RETRAIN_SUFFIX: Final = ".retrain"
"""The registered model `NAME.retrain` holds which retrainings of `NAME` began."""
BOOKS: Final = (HISTORY_SUFFIX, RETRAIN_SUFFIX)
"""How the names end that no model of a user may have."""
Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "history", "prompt",
    "completion", "text", "system", "tools", "id",
]  # fmt: skip
"""The keys of a row that a format reads."""


class ModelSection(Settings):
    """The model to start from."""

    base_model: str = Field(min_length=1)
    """`demo`, a local folder, or `hf://org/name@revision`."""


class Source(Settings):
    """One place that rows come from; a string in the recipe is its `path`."""

    path: str = Field(min_length=1)
    """Local file, folder or glob, `hf://org/name[@revision]`, `s3://`, `gs://`, or `demo:train`."""
    name: str = ""
    """In the contract's counts; unset: the path."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How a row is laid out; `auto` goes by its keys."""
    columns: dict[Column, str] = Field(default={})
    """A format's key -> the column that holds it, such as `prompt: question`."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often training sees each row: 2 writes it twice, 0.25 takes a quarter of the rows, by
    content hash. Held-out rows are taken once each whatever the weight."""
    config: str = ""
    """Of a hub data set."""
    split: str = Field(default="train", min_length=1)
    """Of a hub data set."""

    @property
    def label(self) -> str:
        """What messages and counts call it."""
        return self.name or self.path


class ContractLimits(Settings):
    """What prepared data has to hold; crossing one limit fails the step and keeps the report.

    Shares are of the rows that came in, unless said otherwise.
    """

    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """Rows of each source that can't be used: malformed, no answer, refused by the template, ..."""
    max_too_long_fraction: float = Field(default=0.5, ge=0, le=1)
    """Rows that `overflow: drop` takes out."""
    max_duplicate_fraction: float = Field(default=0.5, ge=0, le=1)
    """Rows that are exact or near duplicates of another one."""
    max_repeated_id_fraction: float = Field(default=0.0, ge=0, le=1)
    """Rows whose `id` an earlier row of the same source has, with other content."""
    max_leaked_fraction: float = Field(default=0.0, ge=0, le=1)
    """Held-out rows (validation, test, evaluation sets) that a training row still resembles."""
    max_unsupervised_fraction: float = Field(default=0.05, ge=0, le=1)
    """Rows with no token left to learn from."""
    min_supervised_token_fraction: float = Field(default=0.001, ge=0, le=1)
    """Supervised share of the training tokens."""
    min_eos_fraction: float = Field(default=0.9, ge=0, le=1)
    """Supervised turns of training rows that end with a token that generation stops at."""
    min_round_trip_fraction: float = Field(default=1.0, ge=0, le=1)
    """Checked rows whose tokens are those that serving renders."""


class DataSection(Settings):
    """Where rows come from and how they become tokens."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Sources to learn from: jsonl, json, parquet or csv, each also .gz or .zst."""
    test: tuple[Source, ...] = ()
    """Sources used as the test split; without them it is taken from `train` by content hash."""
    evaluation_sets: tuple[Source, ...] = ()
    """Sources that training must not have seen, such as benchmarks: only checked against."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of `train` rows held out to watch overfitting."""
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of `train` rows held out for evaluation; not used when `test` is given."""
    group_by: str = ""
    """Column whose equal values stay in one split; unset: conversations that open alike do."""
    max_seq_len: int = Field(default=1024, ge=8)
    """Longest row in tokens."""
    overflow: Literal["drop", "truncate_left", "truncate_right", "split"] = "drop"
    """What happens to a longer row: dropped, cut at its start or its end, or cut into pieces."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """What is learned: every assistant turn, the last one, or all text."""
    fallback_template: Literal["", "chatml", "plain"] = ""
    """Chat template for a tokenizer that has none; unset: such a tokenizer is refused."""
    near_duplicate_similarity: float = Field(default=0.9, ge=0.5, le=1)
    """Jaccard similarity of two rows' five-word sequences from which they are near duplicates; 1
    looks for exact ones only."""
    leakage: Literal["drop", "report"] = "drop"
    """Training rows that resemble a held-out row: dropped and counted, or only reported."""
    contract: ContractLimits = ContractLimits()
    """Limits of the data contract."""

    @field_validator("train", "test", "evaluation_sets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, (str, Mapping, Source)):
            value = (value,)
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    @property
    def heldout_test_fraction(self) -> float:
        """Share of `train` rows that become the test split."""
        return 0.0 if self.test else self.test_fraction


class TrainingSection(Settings):
    """The training loop."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; fractions are allowed."""
    learning_rate: float | None = Field(default=None, gt=0, lt=10)
    """Peak learning rate of AdamW; unset: the method's own, as `tuneline methods` shows."""
    schedule: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "constant",
        "constant_with_warmup",
        "reduce_lr_on_plateau",
    ] = "linear"
    """Of the learning rate after warm-up, by the names of transformers. `cosine_with_min_lr` and
    `cosine_warmup_with_min_lr` end at a tenth of the peak, and the latter starts above 0;
    `warmup_stable_decay` decays in the last tenth of the steps; `constant` has the warm-up of
    `warmup_fraction` too. `reduce_lr_on_plateau` has none: it halves the rate after two evaluations
    in a row without a lower validation loss."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    batch_tokens: int = Field(default=4096, ge=8)
    """Most tokens in one micro-batch, padding included; rows of like length go together."""
    batching: Literal["auto", "grouped", "packed"] = "auto"
    """`grouped`: rows of like length, padded. `packed`: rows end to end without padding, attention
    cut between them. `auto`: packed where attention costs nothing across the cut (flash attention
    on an accelerator), else grouped, which is faster there."""
    gradient_checkpointing: bool = False
    """Keep the activations of block borders only and compute the others again: about a third more
    time for a fraction of the memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the computation; what trains is held in fp32 always. `auto`: bf16 on an accelerator that
    has it; on a CPU with bf16 units (AVX-512 BF16, AMX) for products with frozen weights, and fp32
    for the rest; else fp32."""
    kernels: Literal["auto", "off"] = "auto"
    """`auto`: flash attention and Liger kernels on an accelerator where they are installed."""
    sharding: Literal["auto", "full", "none"] = "auto"
    """Of several processes. `full`: weights, gradients and optimizer state are divided over them
    (FSDP2), for method full only. `none`: each has all of them (DDP). `auto`: full for method full,
    else none."""
    compile: bool = False
    """torch.compile: faster steps after some minutes of compiling, which a short run never wins
    back."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step; the loss is the mean over all their supervised tokens."""
    evaluations: int = Field(default=2, ge=1)
    """How often the validation loss is measured, evenly spread, the last time at the end."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations in a row without a lower validation loss; unset: never.
    Needs `load_best`."""
    load_best: bool = False
    """Take the weights with the lowest validation loss instead of the last ones."""
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    """Between two checkpoints, what a lost process costs at most; 0 after every step. Writing them
    takes a twentieth of the time at most."""
    save_total_limit: int = Field(default=2, ge=1)
    """The newest checkpoints that are kept, beside the best one."""
    keep_checkpoints: bool = False
    """Leave the checkpoints where they are after success."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Of the initialization, the row order and dropout."""

    @model_validator(mode="after")
    def _best_is_known(self) -> TrainingSection:
        if self.early_stopping_patience is not None and not self.load_best:
            raise ValueError(
                "early_stopping_patience needs load_best: true, or the weights that were worse "
                "would be taken"
            )
        return self


class EvaluationSection(Settings):
    """What is measured on the test split, and how."""

    metrics: tuple[str, ...] = Field(default=METRICS, min_length=1)
    """What every row is scored by. Without a metric of answers (`cross_entropy`, `perplexity`
    alone), nothing is generated."""
    slices: tuple[str, ...] = ()
    """Columns of the rows; each of their values gets scores of its own."""
    max_rows: int = Field(default=1000, ge=1)
    """At most this many test rows, of more those with the lowest hash."""
    batch_size: int = Field(default=32, ge=1)
    """Most prompts generated at once."""
    batch_tokens: int = Field(default=16384, ge=8)
    """Most tokens generated at once, prompts and padding included: the cache of keys and values
    grows with them."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; unset: the longest reference plus a quarter."""
    general_text: bool = True
    """Measure forgetting on the general text that comes with tuneline."""
    forgetting_sets: dict[str, str] = Field(default_factory=dict)
    """Name -> local file of texts that the model must not forget: paragraphs of `.txt`, or JSON
    lines with `text`."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (the extra `lm-eval`): names of its own tasks and groups, or local `.yaml`
    files, which go by their file name without the suffix."""
    task_limit: int | None = Field(default=None, ge=1)
    """At most this many documents of each task, the first ones; unset: all."""
    task_batch_size: int = Field(default=8, ge=1)
    """Documents at once. The scores of the whole vocabulary are held for each of their tokens."""
    task_chat_template: bool = False
    """Put a task's prompts into the tokenizer's chat template; published results mostly do not."""
    task_code: bool = False
    """Let local task files name Python functions (`!function`, `class`), and run tasks that run
    what a model wrote (`unsafe_code`)."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What generates the answers of all models alike. `auto`: vllm where the package and an
    accelerator that it runs on are there, else transformers. `vllm` refuses to go on without them.
    Models that it can't serve are left to transformers, and the others with them; the report says
    which it was."""

    @field_validator("metrics", "slices", "tasks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("forgetting_sets")
    @classmethod
    def _leave_the_projects_own_name(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name.strip().lower().replace("_", " ") in ("", GENERAL):
                raise ValueError(
                    f"'{name}' is no name for a set of yours, since '{GENERAL}' is what "
                    "evaluation.general_text measures: choose another"
                )
        return value

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if fault := unknown_metric(name):
                raise ValueError(fault)
        return tuple(dict.fromkeys(value))

    @field_validator("tasks")
    @classmethod
    def _have_names_of_their_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        labels = [task_label(task) for task in value]
        if "" in labels:
            raise ValueError("a task is the name of one of lm-eval's, or a .yaml file")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(
                f"two tasks go by the name {', '.join(twice)}: each needs one of its own"
            )
        return value


def task_label(task: str) -> str:
    """What a task goes by: its name, or its file's without the suffix."""
    return Path(task).stem if is_task_file(task) else task


def is_task_file(task: str) -> bool:
    """Whether an entry of evaluation.tasks is a file; else it names a task of lm-eval's own."""
    return task.endswith((".yaml", ".yml"))


class GateSection(Settings):
    """What has to hold before a version may become champion."""

    metric: str = "exact_match"
    """The metric that decides, one of evaluation.metrics."""
    min_gain: float = Field(default=0.0, ge=0)
    """The lower bound of the 95 % interval of the gain over the base must be above this. Of
    metrics where lower is better, gain is what they went down by."""
    min_rows: int = Field(default=100, ge=10)
    """Fewer test rows refuse the promotion. On fewer than 10 the interval means nothing."""
    champion: Literal["better", "not_worse", "ignore"] = "better"
    """`better`: the interval of the gain over the current champion must lie above champion_margin.
    `not_worse`: it must not reach below minus champion_margin. `ignore`: no comparison."""
    champion_margin: float = Field(default=0.0, ge=0)
    """In the metric's unit."""
    slice_floors: dict[str, float] = Field(default_factory=dict)
    """`column` or `column=value` -> least score of the tuned model on each such slice (highest, for
    metrics where lower is better); the column must be one of evaluation.slices. `column` alone
    covers the rows without that column too, as a slice of their own."""
    min_slice_rows: int = Field(default=10, ge=1)
    """A slice with a floor and fewer test rows refuses the promotion."""
    max_forgetting: float | None = Field(default=None, ge=0)
    """Most that the upper bound of the change of loss on each set of general text may be, in nats
    per token; unset: it is measured and not judged."""
    max_task_drop: dict[str, float] = Field(default_factory=dict)
    """`task` or `task:metric` -> most that the tuned model may lose against the base there, in the
    metric's unit, by the far end of the interval; without a metric the task's first one."""
    refused: Literal["register", "skip"] = "register"
    """What becomes of a refused model: registered without an alias, or not registered."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if fault := unknown_metric(value):
            raise ValueError(fault)
        return value

    @field_validator("max_task_drop")
    @classmethod
    def _are_drops(cls, value: dict[str, float]) -> dict[str, float]:
        for place, drop in value.items():
            if drop < 0:
                raise ValueError(f"{place}: a drop is at least 0")
        return value


class ExportSection(Settings):
    """The form in which the tuned model leaves."""

    form: Literal["auto", "merged", "packaged"] = "auto"
    """`merged`: plain weights of the base's architecture. `packaged`: the base by reference and
    the adapter beside it. `auto`: merged where the method can be."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Of merged weights; `keep`: as the base stores each of them."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: linear layers of the merged model in bitsandbytes' 4 bits."""
    quantized_base: Literal["dequantized", "original"] = "dequantized"
    """What an adapter that was trained on a base in 4 bits is merged into: `dequantized`, the
    weights that it was trained on, or `original`, the base before it was quantized."""
    max_shard_size_gb: float | None = Field(default=None, gt=0)
    """Largest weight file in GB (1e9 bytes); unset: the base's own files."""
    combine: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    """How the changes of several LoRA adapters become one: their weighted sum, or TIES (Yadav et
    al. 2023) or DARE (Yu et al. 2024), each tensor by itself."""
    weights: tuple[float, ...] = ()
    """One factor per adapter; unset: 1 for each."""
    density: float = Field(default=0.5, gt=0, le=1)
    """Share of each change that TIES and DARE keep."""

    @field_validator("quantized_base", mode="before")
    @classmethod
    def _not_in_4_bits(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in ("4bit", "4-bit", "nf4", "quantized"):
            raise ValueError(_INSIDE_4_BITS)
        return value


_INSIDE_4_BITS: Final = (
    "merging inside 4 bits is refused: its levels are further apart than the change that was "
    "trained, so that rounding would take most of the tuning away. Use dequantized or original "
    "with export.quantization none, or export.form packaged, which keeps the 4-bit base and the "
    "adapter"
)


class RegistrySection(Settings):
    """Where the model is registered."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9_.\- ]+$")
    """Name of the registered model in MLflow."""
    require_approval: bool = False
    """Whether promotion waits until a person ran `tuneline approve`."""
    to_model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.\- ]+$")
    """Another registered model, as `production.orders`, to copy a new champion to."""
    experiment: str = Field(default="tuneline", min_length=1)
    """MLflow experiment of the run."""

    @field_validator("model_name", "to_model")
    @classmethod
    def _keeps_histories_apart(cls, value: str | None) -> str | None:
        if value is not None and value.endswith(BOOKS):
            raise ValueError(f"must not end with {' or '.join(BOOKS)}, which tuneline uses itself")
        return value

    @model_validator(mode="after")
    def _copies_to_another(self) -> RegistrySection:
        if self.to_model == self.model_name:
            raise ValueError("to_model must be another model than model_name")
        return self


class RetrainSection(Settings):
    """When `retrain` trains on data that changed. With nothing set, every change is trained on;
    else a change waits until one of these holds."""

    min_new_rows: int | None = Field(default=None, ge=1)
    """So many distinct rows to train on that were not there at the last retraining."""
    min_drift: float | None = Field(default=None, gt=0, le=1)
    """The words or lengths of the rows moved this far: Jensen-Shannon distance, 0 to 1."""
    max_champion_age_days: float | None = Field(default=None, gt=0)
    """The champion became it so long ago."""

    @property
    def any(self) -> bool:
        """Whether one of them is set."""
        return any(value is not None for value in self.model_dump().values())


class Recipe(Settings):
    """A whole recipe."""

    model: ModelSection
    data: DataSection
    method: AnyMethod = LoraSettings()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    gate: GateSection = GateSection()
    export: ExportSection = ExportSection()
    registry: RegistrySection
    retrain: RetrainSection = RetrainSection()
    compare: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Legs of `tuneline compare`: a method's name, or a name of your own with `method` naming one,
    to `learning_rate` and the hyperparameters that differ from the method's defaults."""

    @field_validator("method", mode="before")
    @classmethod
    def _lora_unless_named(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "name" not in value:
            return {"name": "lora", **value}
        return value


SECTIONS: Final = tuple(Recipe.model_fields)


def resolve(values: Mapping[str, Any], *, source: str = "recipe", exports: bool = True) -> Recipe:
    """Check all sections, and each against the others, and fill in the defaults.

    Args:
        values: the sections.
        source: what errors name.
        exports: whether the run ends in an exported model, of a form that not every method has.

    Raises:
        RecipeError: with every fault.
    """
    recipe = _validate(Recipe, values, source)
    method = method_of(recipe.method)
    check_gate(recipe.gate, recipe.evaluation, source=source)
    if exports:
        check_form(recipe.method, recipe.export.form, source=source)
        check_export(recipe.method, recipe.export, source=source)
    check_sharding(method, recipe.training, source=source)
    training = with_learning_rate(recipe.training, method)
    return recipe.model_copy(update={"training": training})


def method_of(settings: MethodSettings) -> Method:
    """The row of METHODS that settings belong to."""
    return next(method for method in METHODS if method.config_class is type(settings))


def method_named(name: str) -> Method:
    """The row of METHODS with this name.

    Raises:
        RecipeError: there is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise RecipeError("method", [unknown_method(name)])


def with_learning_rate(training: TrainingSection, method: Method) -> TrainingSection:
    """The training settings with the method's own learning rate where none is set."""
    if training.learning_rate is not None:
        return training
    return training.model_copy(update={"learning_rate": method.learning_rate})


def check_sharding(method: Method, training: TrainingSection, *, source: str) -> None:
    """Refuse to divide what does not train.

    Raises:
        RecipeError: sharding is asked for with a method that trains little beside a frozen base.
    """
    if training.sharding == "full" and method.stored_as != "model":
        able = [other.name for other in METHODS if other.stored_as == "model"]
        raise RecipeError(
            source,
            [
                f"training.sharding: full is not possible with method {method.name}, whose base is "
                f"frozen: use auto or none, or method {', '.join(able)}"
            ],
        )


def check_form(settings: MethodSettings, form: str, *, source: str) -> None:
    """Refuse an export that the method has no form for, before it costs anything.

    Raises:
        RecipeError: merged weights are asked for, and the method can't promise them; or a package,
            and there is no adapter to put into it.
    """
    method = method_of(settings)
    if form == "packaged" and method.stored_as == "model":
        raise RecipeError(
            source,
            [
                f"export.form: packaged is not possible with method {method.name}, whose result is "
                "a whole model and no adapter: use auto or merged"
            ],
        )
    hindrance = settings.merge_hindrance
    if not method.mergeable:
        hindrance = "makes a change that has no equal form in the base's weights"
    if form == "merged" and hindrance:
        able = [m.name for m in METHODS if m.mergeable and not m.config_class().merge_hindrance]
        raise RecipeError(
            source,
            [
                f"export.form: merged is not possible with method {method.name}, which "
                f"{hindrance}: use auto or packaged, or a method that merges ({', '.join(able)})"
            ],
        )


def check_gate(gate: GateSection, evaluation: EvaluationSection, *, source: str) -> None:
    """Refuse a gate that asks for what is not measured.

    Raises:
        RecipeError: with every fault.
    """
    faults = []
    if gate.metric not in evaluation.metrics:
        faults.append(
            f"gate.metric: {gate.metric} is not among evaluation.metrics "
            f"({', '.join(evaluation.metrics)}): add it there, or choose one of these"
        )
    for place in gate.slice_floors:
        column, _ = slice_of(place, evaluation.slices)
        if column not in evaluation.slices:
            faults.append(
                f"gate.slice_floors: {column} is not among evaluation.slices "
                f"({', '.join(evaluation.slices) or 'none'}): add it there"
            )
    if gate.max_forgetting is not None and not (
        evaluation.general_text or evaluation.forgetting_sets
    ):
        faults.append(
            "gate.max_forgetting: nothing measures forgetting: set evaluation.general_text or "
            "evaluation.forgetting_sets"
        )
    labels = [task_label(task) for task in evaluation.tasks]
    for place in gate.max_task_drop:
        if (task := place.partition(":")[0]) not in labels:
            faults.append(
                f"gate.max_task_drop: {task} is not among evaluation.tasks "
                f"({', '.join(labels) or 'none'}): add it there"
            )
    if faults:
        raise RecipeError(source, faults)


def slice_of(place: str, columns: Iterable[str]) -> tuple[str, str | None]:
    """The column of a `column` or `column=value`, and the value if there is one.

    Args:
        place: as in gate.slice_floors.
        columns: that there are; their names may have `=` in them.
    """
    for column in columns:
        if place == column:
            return column, None
        if place.startswith(f"{column}="):
            return column, place[len(column) + 1 :]
    column, separator, value = place.partition("=")
    return column, value if separator else None


def check_export(settings: MethodSettings, export: ExportSection, *, source: str) -> None:
    """Refuse an export that would lose the tuning.

    Raises:
        RecipeError: a change trained on a base in 4 bits is to go back into 4 bits; or a package is
            asked for, and settings that only merged weights have.
    """
    if export.form == "packaged" and (unused := of_weights(export)):
        raise RecipeError(
            source,
            [f"export.{name}: has no effect with form packaged, leave it out" for name in unused],
        )
    inside = export.quantization == "nf4" and export.quantized_base == "dequantized"
    if inside and settings.quantization is not None and export.form != "packaged":
        raise RecipeError(source, [f"export.quantization: {_INSIDE_4_BITS}, got 'nf4'"])


def of_weights(export: ExportSection) -> list[str]:
    """Names of the settings that were changed and that only merged weights have."""
    fields = ExportSection.model_fields
    names = [name for name in fields if name != "form"]
    return [name for name in names if getattr(export, name) != fields[name].default]


def check(settings: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Check one section on its own, as a single step does.

    Raises:
        RecipeError: with every fault.
    """
    return _validate(settings, values, source)


def method_settings(values: Mapping[str, Any]) -> MethodSettings:
    """The checked configuration of the method that `values["name"]` names.

    Raises:
        RecipeError: unknown method, or faults in its hyperparameters.
    """
    method = method_named(str(values.get("name", "lora")))
    return _validate(method.config_class, values, f"method {method.name}")


def unknown_method(name: str) -> str:
    """The sentence for a method that does not exist."""
    names = [method.name for method in METHODS]
    return f"method '{name}' is unknown; methods are {', '.join(names)}.{did_you_mean(name, names)}"


def read(path: Path, overrides: Iterable[str] = (), *, exports: bool = True) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises:
        RecipeError: no such file, not YAML, or faults in it.
    """
    values = apply_overrides(read_values(path), overrides)
    return resolve(values, source=str(path), exports=exports)


def read_values(path: Path) -> dict[str, Any]:
    """What stands in a recipe file; it is not checked yet.

    Raises:
        RecipeError: no such file, not YAML, or no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            str(path), ["no such file; examples/ has recipes to start from"]
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"can't be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise RecipeError(str(path), [f"must be a mapping of sections {', '.join(SECTIONS)}"])
    return values


def with_method(values: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values for another method, and the hyperparameters that it has not.

    What neither method has stays, for the check to find.

    Raises:
        RecipeError: unknown method.
    """
    wanted = method_named(name).config_class.model_fields
    section = values.get("method")
    if not isinstance(section, Mapping):
        return {**values, "method": {"name": name}} if section is None else dict(values), []
    former = method_named(str(section.get("name", "lora"))).config_class.model_fields
    dropped = [key for key in section if key in former and key not in wanted]
    kept = {key: value for key, value in section.items() if key not in dropped}
    return {**values, "method": {**kept, "name": name}}, dropped


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `section.key=value` set; values are read as YAML.

    Raises:
        RecipeError: an override has another form.
    """
    import yaml

    result = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    faults = []
    for override in overrides:
        path, separator, text = override.partition("=")
        section, _, key = path.strip().partition(".")
        if not separator or not key:
            faults.append(f"'{override}' is not of the form section.key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            faults.append(f"the value of '{override}' is not YAML")
            continue
        if isinstance(value, str):
            value = _number(value)
        target = result.setdefault(section, {})
        if not isinstance(target, dict):
            faults.append(f"'{override}': {section} is not a section")
            continue
        target[key] = value
    if faults:
        raise RecipeError("--set", faults)
    return result


def _number(text: str) -> float | str:
    # YAML 1.1 reads 1e-3 as a string, since it has no dot
    try:
        return float(text)
    except ValueError:
        return text


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def _validate(settings: type[T], values: Mapping[str, Any], source: str) -> T:
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise RecipeError(source, [_fault(settings, dict(e)) for e in error.errors()]) from error


def _fault(settings: type[Settings], error: Mapping[str, Any]) -> str:
    location = list(error["loc"]) or [""]
    section: type[Settings] = settings
    if error["type"].startswith("union_tag"):
        return unknown_method(str(dict(error["input"]).get("name")))
    if settings is Recipe and location[0] == "method" and len(location) > 2:
        # pydantic puts the chosen method's name in front of the key
        section = method_named(str(location.pop(1))).config_class
    *parents, last = location
    where = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        allowed = list(
            section.model_fields if parents[:1] == ["method"] else _keys(settings, parents)
        )
        hint = did_you_mean(str(last), allowed)
        return f"{where}: unknown key; keys here are {', '.join(allowed)}.{hint}"
    if error["type"] == "missing":
        return f"{where}: is required"
    if where == "name":
        return unknown_method(str(error["input"]))
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"


def _keys(settings: type[Settings], path: Iterable[Any]) -> list[str]:
    current: Any = settings
    for part in path:
        if isinstance(part, int):
            current = get_args(current)[0]
        else:
            current = current.model_fields[part].annotation
    return list(current.model_fields)
