"""Base + Adapter -> MergedModel, tensor by tensor, and proof that it computes the same.

The base's safetensors files are read and written one tensor at a time, with the base's own header:
names, shapes, dtypes and order stay what they were, and memory holds one tensor whatever the size
of the model. Tied embeddings stay tied because nothing is added to the files.

The proof compares logits of base, adapter-on-base and the merged model on seeded random tokens. It
loads the model twice, one after the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.errors import MergeError
from tuneline.evaluate.evaluate import check_lineage
from tuneline.finetune.methods import METHODS
from tuneline.finetune.methods.method import MergeTensor
from tuneline.progress import report
from tuneline.recipe import method_of, method_settings
from tuneline.tracking import Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROOF: Final = "proof.json"
_LOST_SHARE_ALLOWED: Final = 0.5
"""A merge that lost the tuning has 1. A weak adapter in half precision can come close, when its
change is of the size of the rounding: then the merged model is not the tuned one either."""
_PROOF_SHAPE: Final = (8, 32)
"""Sequences x tokens."""
_LIMITS: Final = {"float32": (1e-2, 0.99), "bfloat16": (1.0, 0.95), "float16": (0.2, 0.98)}
"""dtype -> largest logit difference, least top-1 agreement. Logits of language models span some
tens; fp32 sums in another order differ by about 1e-4 of that. Half precision rounds W + change
itself (8 bits of mantissa in bf16, 11 in fp16), and the error grows through the layers: a bf16
copy of SmolLM2-135M with the demo's adapter moved logits by up to 0.23."""


@dataclass(frozen=True)
class Proof:
    """How far the merged model's logits are from the adapter's."""

    max_logit_diff: float
    top1_agreement: float
    positions: int
    dtype: str
    lost_share: float
    """Mean logit difference from the adapter, over the adapter's own from the base."""
    max_logit_diff_allowed: float
    top1_agreement_needed: float


def merge(model_reference: str, adapter_dir: Path, output: Path, step: Step) -> Artifact:
    """Write the tuned model as weights of the base's architecture.

    Raises:
        ArtifactError: the adapter was trained on another base.
        MergeError: the method can't be merged, or the proof fails; the adapter is kept.
    """
    adapter = artifacts.load(adapter_dir, "adapter")
    base = base_model.resolve(model_reference)
    check_lineage(adapter, base, None)
    method = method_of(method_settings(adapter.manifest.config["method"]))
    if method.open_merge is None:
        mergeable = ", ".join(m.name for m in METHODS if m.mergeable)
        raise MergeError(
            f"method {method.name} can't be merged into weights; these can: {mergeable}"
        )
    from tuneline.finetune.load import load_tuned, stands_on_base

    merge_tensor, targets = method.open_merge(str(adapter_dir))
    with artifacts.writing(output) as aside:
        base_model.copy_small_files(base.path, aside)
        index = base.path / "model.safetensors.index.json"
        if index.is_file():
            shutil.copyfile(index, aside / index.name)
        merged: set[str] = set()
        for shard in base_model.weight_files(base.path):
            merged |= merge_shard(shard, aside / shard.name, merge_tensor)
        if missing := sorted(targets - merged):
            raise MergeError(
                f"the base has no tensor {missing[0]} ({len(missing)} of {len(targets)} that the "
                "adapter changes are not in its files): nothing was written"
            )
        report(f"merged {len(merged)} tensors")
        proof = prove(
            base.path,
            aside,
            lambda loaded: load_tuned(base, adapter, loaded if stands_on_base(adapter) else None),
            trust_code=base.trusts_code,
        )
        (aside / PROOF).write_text(json.dumps(asdict(proof), indent=2) + "\n")
        artifacts.seal(
            aside,
            kind="merged_model",
            config=adapter.manifest.config,
            base_model=base.identity(),
            inputs={"adapter": adapter.digest},
        )
    step.log_metrics(
        {
            "merge_max_logit_diff": proof.max_logit_diff,
            "merge_top1_agreement": proof.top1_agreement,
        }
    )
    report(
        f"proof: largest logit difference {proof.max_logit_diff:.1e}, top-1 agreement "
        f"{proof.top1_agreement:.4f} on {proof.positions} positions"
    )
    return artifacts.load(output, "merged_model")


def merge_shard(source: Path, target: Path, merge_tensor: MergeTensor) -> set[str]:
    """Stream one safetensors file through `merge_tensor`.

    The format is 8 bytes of header length, a JSON header, then the tensors' bytes in the order of
    their offsets. Since dtypes and shapes don't change, the header is written as it was read.

    Returns:
        Names of the tensors that changed.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        length = reader.read(8)
        header = reader.read(int.from_bytes(length, "little"))
        writer.write(length + header)
        return set(_stream(json.loads(header), reader, writer, merge_tensor, source))


def _stream(
    header: dict[str, dict[str, Any]],
    reader: BinaryIO,
    writer: BinaryIO,
    merge_tensor: MergeTensor,
    source: Path,
) -> Iterator[str]:
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        raw = bytearray(reader.read(end - start))
        if len(raw) != end - start:
            raise MergeError(f"{source} is cut short at tensor {name}: fetch the base model again")
        dtype = dtypes.get(str(entry["dtype"]))
        if dtype is not None and raw:
            tensor = torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"])
            result = merge_tensor(name, tensor)
            if result is not tensor:
                raw = result.contiguous().view(torch.uint8).numpy().data
                yield name
        writer.write(raw)


def prove(
    base_path: Path,
    merged_path: Path,
    tune: Callable[[PreTrainedModel], torch.nn.Module],
    *,
    trust_code: bool = False,
) -> Proof:
    """Compare the tuned model with the merged one.

    Args:
        base_path: the base's folder.
        merged_path: the merged model's folder.
        tune: gives the tuned model; it may put the adapter on the loaded base that it is given.
        trust_code: run the folders' own Python code, whose pin was checked.

    Raises:
        MergeError: a limit is broken.
    """
    import gc

    import torch

    from tuneline.finetune.load import load_base

    loaded = load_base(base_path, trust_code=trust_code)
    # rounding happens where the merged weights are stored, whatever they are computed in
    dtype = base_model.stored_dtype(base_path)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.config.vocab_size, _PROOF_SHAPE, generator=generator)
    untuned = _logits(loaded, tokens)
    tuned = tune(loaded)
    expected = _logits(tuned, tokens)
    del loaded, tuned
    gc.collect()
    actual = _logits(load_base(merged_path, trust_code=trust_code), tokens)
    limit, agreement_needed = _LIMITS[dtype]
    change = float((expected - untuned).abs().mean())
    error = float((expected - actual).abs().mean())
    proof = Proof(
        max_logit_diff=float((expected - actual).abs().max()),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
        positions=tokens.numel(),
        dtype=dtype,
        lost_share=error / change if change else float(error > 0),
        max_logit_diff_allowed=limit,
        top1_agreement_needed=agreement_needed,
    )
    close = proof.max_logit_diff <= limit and proof.top1_agreement >= agreement_needed
    if not (close and proof.lost_share <= _LOST_SHARE_ALLOWED):
        raise MergeError(
            f"the merged model is not the tuned one: largest logit difference "
            f"{proof.max_logit_diff:.3g} (allowed in {dtype}: {limit}), top-1 agreement "
            f"{proof.top1_agreement:.3f} (needed: {agreement_needed}), lost share of the tuning "
            f"{proof.lost_share:.2f} (allowed: {_LOST_SHARE_ALLOWED}); the adapter is kept"
        )
    return proof


def _logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    model.eval()
    with torch.inference_mode():
        return model(tokens.to(next(model.parameters()).device)).logits.float().cpu()
