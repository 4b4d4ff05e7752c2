"""Answers by vLLM in place of transformers, where it can be had.

It serves plain causal models and plain LoRA adapters, and its differences from transformers are of
the size that other kernels make: enough to turn a token. So in one evaluation it answers for all
models or for none, and the report says which. It works in a process of its own, whose end
gives the accelerator's memory back.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import ModelError, RecipeError
from tuneline.evaluate.compare import BASE, CHAMPION, TUNED
from tuneline.evaluate.final_answer import FinalAnswer
from tuneline.evaluate.generate import Generated, end_tokens, fitted, until_end
from tuneline.progress import report

_ADAPTER_CONFIG: Final = "adapter_config.json"  # peft's
_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM reserves memory for; an adapter's rank is rounded up to one of them."""
_LEAST_CAPABILITY: Final = (7, 0)
"""Of a CUDA device, by vLLM's installation guide."""


def faults_of_engine(engine: str) -> list[str]:
    """Why an engine can't be used, as far as it shows where there is no accelerator."""
    if engine != "vllm" or find_spec("vllm") is not None:
        return []
    return [
        "evaluation.engine: vllm is not installed here: install tuneline[vllm] into the image that "
        "evaluates, or use transformers"
    ]


def chosen_engine(engine: str) -> str:
    """The engine that `evaluation.engine` comes to on this machine.

    Raises:
        RecipeError: vLLM is asked for, and it or an accelerator that it runs on is missing.
    """
    import torch

    if engine == "transformers":
        return engine
    faults = faults_of_engine("vllm")
    if not torch.cuda.is_available():
        faults.append(
            "evaluation.engine: vllm needs an accelerator, and none is here: use transformers"
        )
    elif (capability := torch.cuda.get_device_capability()) < _LEAST_CAPABILITY:
        faults.append(
            f"evaluation.engine: vllm needs compute capability {_dotted(_LEAST_CAPABILITY)}, and "
            f"this accelerator has {_dotted(capability)}: use transformers"
        )
    if not faults:
        return "vllm"
    if engine == "vllm":
        raise RecipeError("evaluation", faults)
    return "transformers"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def hindrance(
    base: BaseModel, adapter: Artifact | None, champion: Artifact | None, *, measured_before: bool
) -> str:
    """Why vLLM can't answer for every model of an evaluation; empty if it can.

    Args:
        base: the base.
        adapter: what was tuned on it; None where the base is measured alone, for adapters to come.
        champion: the current one.
        measured_before: whether the base's answers are there already.
    """
    from tuneline.finetune.load import stands_on_base

    if adapter is None or measured_before:
        return "the base is measured once for several methods, not all of which it serves"
    if base.trusts_code:
        return "the base has code of its own"
    if champion is not None and champion.manifest.kind != "merged_model":
        return "the champion is a package"
    config = adapter.path / _ADAPTER_CONFIG
    if not config.is_file():  # a whole model, or an adapter of our own
        return "" if (adapter.path / "config.json").is_file() else "it has no such adapters"
    if not stands_on_base(adapter):
        return "the adapter was trained on a base in 4 bits"
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("peft_type") != "LORA":
        return f"it has no adapters of type {values.get('peft_type')}"
    for key in ("use_dora", "modules_to_save", "target_parameters", "rank_pattern"):
        if values.get(key):
            return f"it has no LoRA with {key}"
    if values.get("bias", "none") != "none":
        return "it has no LoRA with biases"
    if values["r"] > _LORA_RANKS[-1]:
        return f"rank {values['r']} is above {_LORA_RANKS[-1]}"
    of_base = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    if of_base.get("dtype", of_base.get("torch_dtype")) == "float32":
        return "it has LoRA in 16 bits only, and the base has 32"
    return ""


@dataclass(frozen=True)
class Served:
    """One model for vLLM to load, and one LoRA adapter on it."""

    path: str
    adapter: str = ""
    rank: int = 0


def served_by_vllm(
    base: BaseModel,
    adapter: Artifact | None,
    champion: Artifact | None,
    final: FinalAnswer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    measured_before: bool,
) -> dict[str, list[Generated]]:
    """Model -> its answers in the order of the prompts; empty where vLLM can't serve them all.

    Args:
        base: the base.
        adapter: of kind `adapter`.
        champion: merged, or None.
        final: what of the tokens is the answer.
        prompts: rendered by the chat template, special tokens included.
        max_new_tokens: longest answer.
        measured_before: whether the base's answers are there already.

    Raises:
        ModelError: vLLM failed.
    """
    why = hindrance(base, adapter, champion, measured_before=measured_before)
    if why or adapter is None:
        report(f"answers by transformers, since vLLM can't serve this: {why}")
        return {}
    config = adapter.path / _ADAPTER_CONFIG
    if config.is_file():
        rank = json.loads(config.read_text(encoding="utf-8"))["r"]
        wanted = [([BASE, TUNED], Served(str(base.path), str(adapter.path), rank))]
    else:
        wanted = [([BASE], Served(str(base.path))), ([TUNED], Served(str(adapter.path)))]
    if champion is not None:
        wanted.append(([CHAMPION], Served(str(champion.path))))
    asked = final.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    answers: dict[str, list[Generated]] = {}
    for names, served in wanted:
        report(f"answers of {' and '.join(names)} by vLLM")
        answers |= zip(names, _in_a_process(served, asked, final, max_new_tokens), strict=True)
    return answers


def _in_a_process(
    served: Served, whole: list[list[int]], final: FinalAnswer, max_new_tokens: int
) -> list[list[Generated]]:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(served.path)
    context = getattr(config, "max_position_embeddings", None)
    bos = final.tokenizer.bos_token_id
    asked = [fitted(ids, context, max_new_tokens, bos) for ids in whole]
    lengths = [len(ids) for ids in asked]
    try:
        generation = GenerationConfig.from_pretrained(served.path)
    except OSError:  # without a file of its own
        generation = GenerationConfig.from_model_config(config)
    longest = max(lengths) + max_new_tokens
    options = {
        "max_model_len": longest if context is None else min(longest, context),
        # vLLM would round a model in 32 bits; transformers does not
        "dtype": str(config.dtype or "auto").removeprefix("torch."),
    }
    sampling = {
        "temperature": 0.0,
        "repetition_penalty": generation.repetition_penalty or 1.0,
        "stop_token_ids": (ends := end_tokens(generation, final.tokenizer)),
    }
    rooms = [
        max_new_tokens if context is None else min(max_new_tokens, context - n) for n in lengths
    ]
    # not forked: CUDA does not survive that
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found = pool.submit(_generate, served, asked, rooms, options, sampling).result()
    except BrokenProcessPool as error:
        raise ModelError(
            "vLLM's process ended without an answer, mostly for lack of memory: use "
            "evaluation.engine: transformers"
        ) from error
    except Exception as error:  # whatever its process raises, of any of its versions
        raise ModelError(
            f"vLLM failed ({type(error).__name__}: {error}): use evaluation.engine: transformers"
        ) from error
    return [
        [
            Generated(final.of_ids(until_end(ids, ends)), ended, len(cut) < len(of_row))
            for (ids, ended), cut, of_row in zip(of_model, asked, whole, strict=True)
        ]
        for of_model in found
    ]


def _generate(
    served: Served,
    asked: list[list[int]],
    rooms: list[int],
    options: dict[str, Any],
    sampling: dict[str, Any],
) -> list[list[tuple[list[int], bool]]]:
    """What the process does: token ids of the plain model's answers, then of the adapter's."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    if served.adapter:
        rank = next(rank for rank in _LORA_RANKS if rank >= served.rank)
        options = {**options, "enable_lora": True, "max_lora_rank": rank}
    # prompts and answers are token ids: it needs no tokenizer
    llm = LLM(model=served.path, skip_tokenizer_init=True, seed=0, **options)
    prompts = [{"prompt_token_ids": ids} for ids in asked]
    params = [SamplingParams(max_tokens=room, detokenize=False, **sampling) for room in rooms]
    adapters = [None, LoRARequest("tuned", 1, served.adapter)] if served.adapter else [None]
    answers = []
    for adapter in adapters:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
        firsts = [output.outputs[0] for output in outputs]
        answers.append([(list(one.token_ids), one.finish_reason == "stop") for one in firsts])
    return answers
