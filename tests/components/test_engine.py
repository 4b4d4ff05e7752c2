"""Batches, loss and loop compute the same whatever their form."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    IntervalStrategy,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tuneline import artifacts
from tuneline.errors import RecipeError, Terminated, TrainingError
from tuneline.finetune import arguments as arguments_module
from tuneline.finetune import loss as loss_module
from tuneline.finetune.arguments import (
    has_flash_attention,
    packed_rows_are_apart,
    training_arguments,
    training_dtype,
    use_kernels,
)
from tuneline.finetune.batching import TokenBudgetSampler, batches_of, collate, pack
from tuneline.finetune.checkpoint import Checkpoints, Schedule
from tuneline.finetune.load import compute_dtype
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods.lora import METHOD, LoraSettings, attach
from tuneline.finetune.train import finetune
from tuneline.finetune.trainer import ProgressCallback, SupervisedTrainer
from tuneline.recipe import TrainingSection, check
from tuneline.termination import Termination
from tuneline.tracking import Untracked

TOLERANCE = 5e-6
"""Of a gradient's largest element: the same fp32 sums of some hundred terms in another order. An
element that is small because its terms cancel has the rounding of the terms."""


def rows(count: int = 12, seed: int = 0) -> list[dict]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 14, (count,), generator=random).tolist()
    return [
        {
            "row": index,
            "input_ids": torch.randint(3, 200, (length,), generator=random).tolist(),
            "supervised": [0] * (length // 2) + [1] * (length - length // 2),
        }
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def model(tiny_model: Path) -> nn.Module:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = attach(base, LoraSettings(target_modules=("all-linear",)))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return tuned


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, dict]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        nll, _ = supervised_nll(model, batch)
        nll.backward()
        total += float(nll.detach())
    return total, gradients(model)


def assert_same(one: tuple[float, dict], other: tuple[float, dict]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=TOLERANCE * scale)


def test_packed_grouped_and_padded_have_the_same_loss_and_gradients(model: nn.Module) -> None:
    data = rows()
    lengths = [len(row["input_ids"]) for row in data]
    padded = loss_and_gradients(model, [collate(data, 0)])
    grouped = loss_and_gradients(
        model, [collate([data[i] for i in b], 0) for b in TokenBudgetSampler(lengths, 30, 0)]
    )
    packed = loss_and_gradients(
        model,
        [pack([data[i] for i in b]) for b in TokenBudgetSampler(lengths, 30, 0, "packed")],
    )
    assert_same(padded, grouped)
    assert_same(padded, packed)


def test_a_rows_first_token_is_never_learned() -> None:
    data = [{**row, "supervised": [1] * len(row["input_ids"])} for row in rows(3)]
    assert (collate(data, 0)["labels"][:, 0] == -100).all()
    packed = pack(data)
    assert (packed["labels"][packed["position_ids"] == 0] == -100).all()
    assert int((packed["labels"] != -100).sum()) == int((collate(data, 0)["labels"] != -100).sum())


def test_packed_rows_do_not_see_each_other(model: nn.Module) -> None:
    first, second, third = rows(3)
    other = {**second, "input_ids": [7] * len(second["input_ids"])}
    before, after = (
        model(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits[0]
        for b in (pack([first, second, third]), pack([first, other, third]))
    )
    start, end = len(first["input_ids"]), len(first["input_ids"]) + len(second["input_ids"])
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])
    assert packed_rows_are_apart(model)


def test_a_method_that_lets_packed_rows_see_each_other_is_found(tiny_model: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not packed_rows_are_apart(prompts)


def test_a_kernel_that_refuses_fp32_is_tried_in_the_dtype_of_the_loop(
    tiny_model: Path, capsys
) -> None:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def as_flash_attention(module: nn.Module, query: Tensor, *arguments, **options):
        # transformers casts for it where autocast says to what
        if query.dtype is torch.float32 and not torch.is_autocast_enabled(query.device.type):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return plain(module, query, *arguments, **options)

    ALL_ATTENTION_FUNCTIONS.register("refuses_fp32", as_flash_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("refuses_fp32", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="refuses_fp32"
    )
    assert packed_rows_are_apart(model, torch.bfloat16)
    assert not packed_rows_are_apart(model)
    assert "the model fails on a pack: FlashAttention only support" in capsys.readouterr().out
    assert use_kernels(model, TrainingSection(batching="auto")) == "grouped"


@pytest.mark.parametrize(("capability", "has_units"), [((7, 5), False), ((8, 0), True)])
def test_gpus_that_emulate_bf16_compute_in_fp32_without_flash_attention(
    capability: tuple[int, int], has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or has_units  # as torch says on a T4 and on an A100

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(arguments_module, "is_flash_attn_2_available", lambda: True)
    expected = torch.bfloat16 if has_units else torch.float32
    assert training_dtype(TrainingSection()) is compute_dtype() is expected
    assert has_flash_attention() == has_units


def test_packing_fills_the_budget_and_loses_no_row() -> None:
    lengths = [len(row["input_ids"]) for row in rows(200)]
    batches = list(TokenBudgetSampler(lengths, 40, 3, "packed"))
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    sizes = [sum(lengths[row] for row in batch) for batch in batches]
    assert max(sizes) <= 40
    # first fit leaves room in the last pack of each group only
    assert sum(lengths) / (40 * len(batches)) > 0.93


def full_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]),
        batch["labels"][:, 1:].reshape(-1),
        reduction="sum",
    )


SMALL = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=32, n_layer=1, n_head=2))


def _with_bias() -> nn.Module:
    model = _gpt2()
    model.lm_head = nn.Linear(32, 211, bias=True)
    return model


@pytest.mark.parametrize(
    ("make", "chunked"),
    [
        (_gpt2, True),
        (_with_bias, True),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)), False),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), False),
    ],
    ids=["tied", "bias", "capped", "scaled"],
)
def test_every_gradient_of_full_training_equals_the_plain_computation(
    make, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    # 3 positions a chunk, so that there are many and the last one is not full
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4 * 211 * 3)
    batch = collate(rows(), 0)
    full = full_nll(model, batch)
    full.backward()
    expected = (float(full.detach()), gradients(model))
    assert_same(loss_and_gradients(model, [batch]), expected)
    layer = model.get_output_embeddings()
    assert loss_module._PLAIN[layer] is chunked


def test_the_logits_never_exist_as_a_whole(model: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4 * 300 * 2)
    sizes: list[int] = []
    plain = functional.linear

    def seen(*arguments: Tensor) -> Tensor:
        output = plain(*arguments)
        sizes.append(output.shape[0])
        return output

    monkeypatch.setattr(loss_module.functional, "linear", seen)
    batch = collate(rows(), 0)
    nll, count = supervised_nll(model, batch)
    nll.backward()
    head = [size for size in sizes if size]
    assert int(count) > 10 and max(head[-5:]) <= 2


def test_the_probe_of_the_output_layer_leaves_the_random_numbers(model: nn.Module) -> None:
    loss_module._PLAIN.clear()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        supervised_nll(model.eval(), collate(rows(), 0))
    assert torch.equal(torch.rand(1), expected)


# ---- the loop


def trained(
    tiny_model: Path, dataset: artifacts.Artifact, output: Path, **settings
) -> tuple[list[dict], artifacts.Artifact]:
    training = TrainingSection(
        **{"epochs": 2, "learning_rate": 0.01, "batch_tokens": 128, **settings}
    )
    config = LoraSettings(target_modules=("all-linear",), dropout=0.05)
    adapter = finetune(str(tiny_model), dataset.path, config, training, output, Untracked())
    return adapter.read_jsonl("history.jsonl"), adapter


def losses(history: list[dict], key: str = "loss") -> list[float]:
    return [entry[key] for entry in history if key in entry]


def test_the_same_seed_gives_the_same_bits(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path
) -> None:
    _, one = trained(tiny_model, dataset, tmp_path / "one")
    _, two = trained(tiny_model, dataset, tmp_path / "two")
    history, three = trained(tiny_model, dataset, tmp_path / "three", seed=7)
    assert one.digest == two.digest != three.digest
    assert losses(history)[-1] < losses(history)[0]


def loader(data: list[dict], batches: list[list[int]]) -> DataLoader:
    return DataLoader(
        data,  # pyright: ignore[reportArgumentType]
        batch_sampler=_Given(batches),
        collate_fn=lambda batch: collate(batch, 0),
        generator=torch.Generator(),
    )


class _Given:
    """Batches in a given order, in every epoch."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self):
        return iter(self._batches)


def trainer_of(
    model: nn.Module, batches: list[list[int]], tmp_path: Path, steps: int, accumulation: int, **how
) -> SupervisedTrainer:
    training = TrainingSection(
        learning_rate=0.01, gradient_accumulation_steps=accumulation, warmup_fraction=0
    )
    data = how.pop("data", None) or rows(8)
    validation = how.pop("validation", None)
    compiles = how.pop("compiles", False)
    arguments = training_arguments(
        training,
        METHOD,
        steps=steps,
        validates=validation is not None,
        output_dir=tmp_path / "trainer",
    )
    if compiles:
        arguments.torch_compile, arguments.torch_compile_backend = True, "aot_eager"
    return SupervisedTrainer(
        model=model,
        args=arguments,
        train_loader=loader(data, batches),
        validation_loader=validation,
        create_optimizer=lambda chosen, options: None,
        **how,
    )


def test_eight_micro_batches_of_one_equal_one_of_eight(tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for batches, accumulation in (([[i] for i in range(8)], 8), ([list(range(8))], 1)):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = attach(base, LoraSettings())
        trainer = trainer_of(model, batches, tmp_path, steps=4, accumulation=accumulation)
        trainer.run()
        history = trainer.state.log_history
        results.append((losses(history), losses(history, "grad_norm")))
    # Adam divides by the gradient's root mean square: rounding grows along the steps
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-4) and len(one) == 4


def test_a_loss_that_is_not_finite_names_step_and_rows_and_spares_the_weights(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = _gpt2()
    data = rows(6)
    data[4] = {**data[4], "input_ids": [210] * len(data[4]["input_ids"])}
    model.lm_head = nn.Linear(32, 211)  # not tied, so that only rows with token 210 are hit
    with torch.no_grad():
        model.transformer.wte.weight[210] = math.nan
    before = model.lm_head.weight.detach().clone()
    trainer = trainer_of(
        model, [[0, 1], [2, 3], [4, 5]], tmp_path, steps=3, accumulation=3, data=data
    )
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1, in rows \[4\] "):
        trainer.run()
    assert torch.equal(model.lm_head.weight, before)


def test_memory_that_does_not_suffice_says_what_to_lower(model: nn.Module, tmp_path: Path) -> None:
    trainer = trainer_of(model, [[0, 1], [2, 3]], tmp_path, steps=2, accumulation=1)
    compute = trainer.compute_loss

    def greedy(*arguments, **options):
        if trainer.state.global_step == 1:
            torch.empty(2**50)
        return compute(*arguments, **options)

    trainer.compute_loss = greedy
    tokens = 2 * max(len(row["input_ids"]) for row in rows(8)[2:4])
    with pytest.raises(
        TrainingError,
        match=rf"out of memory at step 2 with micro-batches of up to {tokens} tokens: .* "
        rf"lower training.batch_tokens to about {tokens * 3 // 4} and",
    ):
        trainer.run()


@pytest.mark.parametrize("after_training", [False, True])
def test_memory_that_does_not_suffice_for_an_evaluation_is_one_sentence(
    model: nn.Module, tmp_path: Path, after_training: bool
) -> None:
    def greedy(batch):
        torch.empty(2**50)

    held_out = DataLoader(rows(2), collate_fn=greedy)  # pyright: ignore[reportArgumentType]
    trainer = trainer_of(model, [[0]], tmp_path, 1, 1, validation=held_out)
    if after_training:
        trainer.args.eval_strategy = IntervalStrategy.NO
    with pytest.raises(TrainingError, match="out of memory in the evaluation after step 1 with"):
        trainer.run()


@pytest.mark.parametrize(
    ("stop_at", "step"),
    [(10, 2), (8, 2), (16, 4)],
    ids=["inside step 3", "before an evaluation", "at the end"],
)
def test_sigterm_keeps_the_last_whole_step_and_what_was_due_after_it(
    tiny_model: Path, tmp_path: Path, stop_at: int, step: int
) -> None:
    def run(checkpoints: Checkpoints | None, at: int | None) -> SupervisedTrainer:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = attach(base, LoraSettings(dropout=0.2))
        termination = Termination()
        trainer = trainer_of(
            model,
            [[i] for i in range(8)],
            tmp_path,
            steps=4,
            accumulation=4,
            checkpoints=checkpoints,
            schedule=Schedule(60),
            termination=termination,
            validation=loader(rows(5, seed=1), [[0, 1], [2, 3, 4]]),
        )
        calls = 0
        compute = trainer.compute_loss

        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            termination.requested = termination.requested or calls == at
            return compute(*arguments, **options)

        trainer.compute_loss = counted
        trainer.run()
        return trainer

    whole = run(None, None)
    with Checkpoints(tmp_path / "key", limit=1) as checkpoints:
        with pytest.raises(Terminated, match=f"a checkpoint of step {step} was written"):
            run(checkpoints, stop_at)
        resumed = run(checkpoints, None)
    assert len([entry for entry in whole.state.log_history if "eval_loss" in entry]) == 2
    assert resumed.state.log_history == whole.state.log_history
    for (name, one), (_, other) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_gradient_checkpointing_changes_no_bit_of_the_losses(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path
) -> None:
    plain, _ = trained(tiny_model, dataset, tmp_path / "plain")
    again, _ = trained(tiny_model, dataset, tmp_path / "again", gradient_checkpointing=True)
    assert losses(again) == losses(plain)


@pytest.mark.slow
# torch's compiler hides its own, which comes too late where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_has_the_same_losses_and_is_not_compiled_anew_for_each_batch(
    tmp_path: Path,
) -> None:
    results = []
    # more batches than times that the compiler tries the same code (8), of two lengths
    lengths = [6, 9] * 5
    data = [
        {"row": row, "input_ids": [5] * length, "supervised": [0] + [1] * (length - 1)}
        for row, length in enumerate(lengths)
    ]
    for compiles in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        batches = [[row] for row in range(len(lengths))]
        trainer = trainer_of(
            _gpt2().eval(),
            batches,
            tmp_path,
            steps=len(lengths),
            accumulation=1,
            data=data,
            compiles=compiles,
        )
        trainer.run()
        results.append(losses(trainer.state.log_history))
    assert results[1] == pytest.approx(results[0], rel=1e-5) and len(results[0]) == len(lengths)
    # in front of the output layer and after it, for the first length and then for any
    assert 0 < counters["stats"]["unique_graphs"] <= 4


def test_packing_trains_on_the_same_rows_without_padding(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path, capsys
) -> None:
    grouped, _ = trained(tiny_model, dataset, tmp_path / "grouped", epochs=1, learning_rate=1e-6)
    packed, _ = trained(
        tiny_model, dataset, tmp_path / "packed", epochs=1, learning_rate=1e-6, batching="packed"
    )
    assert "padding 0%" in capsys.readouterr().out
    # the same rows of a model that hardly moves, whatever the batches
    assert losses(packed, "eval_loss")[-1] == pytest.approx(
        losses(grouped, "eval_loss")[-1], rel=1e-4
    )


def test_training_stops_early_and_takes_the_best_weights(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path, capsys
) -> None:
    history, adapter = trained(
        tiny_model,
        dataset,
        tmp_path / "out",
        epochs=40,
        learning_rate=0.03,
        schedule="constant",
        evaluations=40,
        early_stopping_patience=2,
        load_best=True,
    )
    measured = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry]
    best, step = min(measured)
    assert len(measured) < 40 and [m for m in measured if m[1] > step][1:] == measured[-1:]
    assert f"took the weights of step {step}" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(loaded, adapter.path)
    batches = batches_of(dataset, "validation", batch_tokens=128, pad_token_id=0, seed=None)
    nll, tokens = loss_module.held_out_nll(tuned, batches)
    assert nll / tokens == pytest.approx(best, rel=1e-5)
    assert not list(tmp_path.glob("*.checkpoints"))


def test_early_stopping_needs_the_best_weights() -> None:
    with pytest.raises(RecipeError, match="early_stopping_patience needs load_best"):
        check(TrainingSection, {"early_stopping_patience": 2}, source="training")


def test_a_validation_loss_that_is_not_finite_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    held_out = loader(rows(2), [[0, 1]])
    trainer = trainer_of(model, [[0]], tmp_path, 1, 1, validation=held_out)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match="validation loss is nan at step 0"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "schedule",
    [
        "linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
        "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay", "constant",
        "constant_with_warmup",
    ],
)  # fmt: skip
def test_schedules_go_by_the_names_of_transformers(schedule, model, tmp_path: Path) -> None:
    training = TrainingSection(schedule=schedule, learning_rate=1.0, warmup_fraction=0.1)
    arguments = training_arguments(training, METHOD, steps=40, validates=False, output_dir=tmp_path)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_loader=loader(rows(2), [[0]]),
        validation_loader=None,
        create_optimizer=lambda chosen, options: None,
    )
    trainer.create_optimizer_and_scheduler(40)
    rates = []
    for _ in range(40):
        trainer.optimizer.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.lr_scheduler.step()
    # the one with a warm-up of its own starts at a step's share of it
    assert rates[0] == (0.25 if "_warmup_with_min" in schedule else 0)
    assert max(rates) == pytest.approx(1.0)
    ends = {"constant": 1.0, "constant_with_warmup": 1.0, "inverse_sqrt": 0.3}
    ends |= {"cosine_with_min_lr": 0.1, "cosine_warmup_with_min_lr": 0.1}
    assert rates[-1] == pytest.approx(ends.get(schedule, 0.0), abs=0.15)


def test_the_rate_on_the_console_is_of_training_since_the_last_line(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    trainer = trainer_of(model, [[0]], tmp_path, steps=4, accumulation=1)
    progress = ProgressCallback(Untracked(), trainer)
    events = (trainer.args, trainer.state, trainer.control)
    trainer.state.max_steps = 4
    trainer.control.should_log = True
    trainer.state.is_world_process_zero = True
    progress.on_train_begin(*events)
    # tokens, seconds of the step, of its evaluation, of its checkpoint
    for tokens, step, evaluation, save in ((100, 10, 0, 0), (300, 10, 50, 40), (500, 10, 0, 0)):
        trainer.figures.tokens_seen += tokens
        now += step
        progress.on_step_end(*events)
        progress.on_log(*events, logs={"loss": 1.0, "learning_rate": 0.1})
        now += evaluation
        progress.on_evaluate(*events)
        now += save
        progress.on_save(*events)
    lines = capsys.readouterr().out.splitlines()
    rates = [line.partition(" tokens/s")[0].split()[-1] for line in lines]
    assert rates == ["10", "30", "50"]
