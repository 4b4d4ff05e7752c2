"""The merged model computes what the tuned one does: shown by its weights and by its outputs.

Weights: every tensor of the output is compared with the base's tensor to which PEFT's own layer,
not this package's arithmetic, has added the adapter. For a base in 4 bits the base's tensor is
what bitsandbytes holds in memory after loading. Two figures a tensor: the relative error
||merged - tuned|| / ||tuned||, which rounding bounds, and the lost share of the change,
<tuned - merged, tuned - base> / ||tuned - base||^2, which is 0 for rounding that knows nothing of
the change and 1 where the change is gone.

Outputs: logits of tuned and merged model on rows of the test split and on random tokens. The models
are computed one after the other, in fp32, each streamed block by block (`streamed.py`); a base in
4 bits is held as it was trained on, a quarter of its size in 16 bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import MergeError
from tuneline.finetune import four_bits
from tuneline.finetune.load import load_base, load_skeleton
from tuneline.finetune.methods import Method
from tuneline.finetune.methods.method import MethodSettings, Quantization, TensorChange
from tuneline.finetune.methods.structure import output_layer
from tuneline.merge.plan import Plan, PlannedTensor
from tuneline.merge.stored import StoredTensor, read_model, read_tensor, same_bytes
from tuneline.merge.streamed import Weights, plain_name, streamed
from tuneline.progress import tick

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_LOGITS_BYTES: Final = 128 << 20
"""Of one model's logits; two are held."""
_MOST_POSITIONS: Final = 512
_TEST_TOKENS: Final = 256
"""Of all test rows together: three models compute them, which on a CPU takes longer than merging.
The shortest row is used up to eight times this length."""
_RANDOM_TOKENS: Final = 64
_RANDOM_LENGTH: Final = 32
_COMPARED_ELEMENTS: Final = 1 << 22


@dataclass(frozen=True)
class Limits:
    """What rounding to a dtype explains."""

    max_logit_diff: float
    mean_kl: float
    """Nats a position."""
    top1_agreement: float
    loss_diff: float
    """Held-out loss of merged minus tuned, nats a token."""
    tensor_error: float
    lost_share: float = 0.5
    """Of the change, in weights and in logits."""


_LIMITS: Final = {
    "float32": Limits(1e-2, 1e-6, 0.99, 1e-3, 1e-5),
    "float16": Limits(0.5, 1e-3, 0.98, 1e-2, 2**-11),
    "bfloat16": Limits(4.0, 1e-2, 0.95, 3e-2, 2**-8),
    "nf4": Limits(100.0, 1.0, 0.5, 0.1, 0.15),
}
"""Why these:

tensor_error is the rounding of one value: half a unit in the last of 24, 11 or 8 bits, and for
fp32 sums in another order. NF4 in blocks of 64 leaves about 0.09 of normally distributed weights.

The others have room over what was measured on SmolLM2-135M with the demo's adapter (logit
difference, KL, agreement, rise of the loss): fp32 7e-5, 7e-12, 1, 5e-8; fp16 0.06, 4e-6, 1, -3e-5;
bf16 0.36 to 1.3, 2e-4, 0.991, 7e-5; NF4 40, 0.43, 0.66, 0.045. Rounding errors of single weights
are independent of each other and of the input, so that they average out in a product and grow with
the square root of the depth. The largest logit difference is the tail of millions of values, on
random tokens that drive activations far out: it only catches what is grossly wrong, and the other
figures the rest.
"""


@dataclass(frozen=True)
class Subject:
    """What was merged."""

    base: BaseModel
    adapter: Artifact
    method: Method
    settings: MethodSettings
    through: Quantization | None
    """The base stands in these 4 bits."""
    combined: Mapping[str, TensorChange] | None = None
    """The change, where several adapters were combined."""


@dataclass(frozen=True)
class Proof:
    """How far the merged model is from the tuned one."""

    max_logit_diff: float
    mean_kl: float
    """KL(tuned || merged), nats a position."""
    top1_agreement: float
    lost_share: float
    """Mean logit difference from the tuned model, over the tuned one's own from the base."""
    positions: int
    dtype: str
    """The coarsest that merged weights are stored in: it sets the limits."""
    reference: str
    """What the merged model was compared with."""
    test_rows: int = 0
    tuned_loss: float | None = None
    """Nats a supervised token of those test rows."""
    merged_loss: float | None = None
    tensors: int = 0
    """Compared one by one."""
    worst_tensor: str = ""
    worst_tensor_error: float = 0.0
    worst_tensor_lost_share: float = 0.0
    limits: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Figures to track."""
        values = {
            "max_logit_diff": self.max_logit_diff,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "lost_share": self.lost_share,
            "worst_tensor_error": self.worst_tensor_error,
        }
        if self.tuned_loss is not None and self.merged_loss is not None:
            values |= {"tuned_loss": self.tuned_loss, "merged_loss": self.merged_loss}
        return values

    def sentence(self) -> str:
        """For a person."""
        if self.reference == SAME_BYTES:
            return "the weight files are the trained ones, byte for byte"
        loss = ""
        if self.tuned_loss is not None and self.merged_loss is not None:
            loss = (
                f", loss on {self.test_rows} test rows {self.tuned_loss:.4f} and "
                f"{self.merged_loss:.4f}"
            )
        return (
            f"largest logit difference {self.max_logit_diff:.1e}, mean KL {self.mean_kl:.1e}, "
            f"top-1 agreement {self.top1_agreement:.4f} on {self.positions} positions{loss}; "
            f"largest error of {self.tensors} tensors {self.worst_tensor_error:.1e}"
        )


SAME_BYTES: Final = "the same bytes"


def prove(
    subject: Subject,
    plan: Plan,
    merged: Path,
    *,
    dataset: Artifact | None = None,
    identical: bool = False,
) -> Proof:
    """Compare the tuned model with the merged one.

    Args:
        subject: what was merged.
        plan: of the output.
        merged: folder of the output.
        dataset: whose test split the logits are compared on, besides random tokens.
        identical: the output's weight files are the tuned model's own.

    Raises:
        MergeError: a limit is broken; names the worst tensor.
    """
    import torch

    if identical:
        return Proof(0.0, 0.0, 1.0, 0.0, 0, dtype_of(plan), SAME_BYTES)
    dtype = dtype_of(plan)
    limits = _LIMITS[dtype]
    tokens = _tokens(subject, dataset)
    tick("proof: computing base and tuned model, comparing tensors")
    with warnings.catch_warnings():
        # peft speaks of layers that it finds unusual; what counts is shown below
        warnings.simplefilter("ignore")
        tensors, untuned, expected = _tuned(subject, plan, merged, tokens)
    known = untuned.shape[1]  # the base does not have added tokens
    change = float((expected[:, :known] - untuned).abs().mean())
    del untuned
    trust_code = subject.base.trusts_code
    tick("proof: computing the merged model")
    if dtype == "nf4":
        actual = _logits(load_base(merged, trust_code=trust_code, dtype=torch.float32), tokens)
    else:
        actual = _logits(streamed(merged, trust_code=trust_code), tokens)
    difference = (expected - actual).abs()
    error = float(difference.mean())
    worst = max(tensors, key=lambda one: one.badness(limits), default=_Tensor("", 0.0, 0.0))
    tuned_loss, merged_loss = tokens.loss(expected), tokens.loss(actual)
    proof = Proof(
        max_logit_diff=float(difference.max()),
        mean_kl=_mean_kl(expected, actual),
        top1_agreement=float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
        lost_share=error / change if change else float(error > 0),
        positions=len(expected),
        dtype=dtype,
        reference=_reference(subject),
        test_rows=tokens.test_rows,
        tuned_loss=tuned_loss,
        merged_loss=merged_loss,
        tensors=len(tensors),
        worst_tensor=worst.name,
        worst_tensor_error=worst.error,
        worst_tensor_lost_share=worst.lost_share,
        limits=vars(limits),
    )
    if faults := _faults(proof, limits):
        where = f"; worst tensor {worst.name}" if worst.name else ""
        raise MergeError(
            f"the merged model is not the tuned one (weights in {dtype}): {'; '.join(faults)}"
            f"{where}; the adapter is kept. {_advice(proof, subject)}"
        )
    return proof


def _faults(proof: Proof, limits: Limits) -> list[str]:
    figures = [
        ("largest logit difference", proof.max_logit_diff, limits.max_logit_diff),
        ("mean KL", proof.mean_kl, limits.mean_kl),
        ("lost share of the tuning", proof.lost_share, limits.lost_share),
        ("error of a tensor", proof.worst_tensor_error, limits.tensor_error),
        ("lost share of a tensor's change", proof.worst_tensor_lost_share, limits.lost_share),
    ]
    if proof.tuned_loss is not None and proof.merged_loss is not None:
        rise = proof.merged_loss - proof.tuned_loss
        figures.append(("rise of the held-out loss", rise, limits.loss_diff))
    faults = [
        f"{name} {value:.3g} (allowed: {limit:.3g})"
        for name, value, limit in figures
        if not value <= limit
    ]
    if not proof.top1_agreement >= limits.top1_agreement:
        faults.append(
            f"top-1 agreement {proof.top1_agreement:.3f} (needed: {limits.top1_agreement})"
        )
    return faults


def _advice(proof: Proof, subject: Subject) -> str:
    if proof.dtype == "nf4":
        return "4 bits round away more than this model bears: export with quantization none"
    packaged = subject.method.stored_as == "adapter"
    if proof.dtype == "float32":
        return "Run the step again" + "; if it fails again, export with form packaged" * packaged
    return "Where the change is as small as the rounding, export.dtype fp32 keeps it" + (
        "; export.form packaged always does" * packaged
    )


def _reference(subject: Subject) -> str:
    if subject.method.stored_as == "model":
        return "the trained weights in fp32"
    if subject.combined is not None:
        return "the base plus the combined changes in fp32"
    if subject.through is not None:
        return "the adapter on the base in 4 bits"
    if subject.settings.quantization is not None:
        return "the adapter on the original base, not the 4-bit one that it was trained on"
    return "the adapter on the base in fp32"


def dtype_of(plan: Plan) -> str:
    """The coarsest form among the output's weights."""
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    if any(tensor.into is not None for tensor in tensors):
        return "nf4"
    found = {tensor.dtype for tensor in tensors}
    for code, name in (("BF16", "bfloat16"), ("F16", "float16")):
        if code in found:
            return name
    return "float32"


@dataclass(frozen=True)
class _Tokens:
    """One batch, and the positions whose logits are compared."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    attention_mask: torch.Tensor
    selected: torch.Tensor
    """(B, T) bool."""
    targets: torch.Tensor
    """(N,): next token where it is supervised, else -100; N positions are selected."""
    test_rows: int

    def loss(self, logits: torch.Tensor) -> float | None:
        """Mean over supervised tokens, nats; None without any."""
        from torch.nn.functional import cross_entropy

        known = self.targets >= 0
        if not bool(known.any()):
            return None
        return float(cross_entropy(logits[known], self.targets[known]))


def _tokens(subject: Subject, dataset: Artifact | None) -> _Tokens:
    """Test rows, the shortest first, and random rows of the same length.

    Positions are chosen so that their logits fit in memory, half of them supervised ones.
    """
    import torch

    model = load_skeleton(subject.base.path, trust_code=subject.base.trusts_code)
    vocabulary = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    most = max(16, min(_MOST_POSITIONS, _LOGITS_BYTES // (4 * vocabulary)))
    rows = _test_rows(dataset, most // 2) if dataset is not None else []
    length = max([_RANDOM_LENGTH, *(len(ids) for ids, _ in rows)])
    generator = torch.Generator().manual_seed(0)
    random_rows = math.ceil(min(_RANDOM_TOKENS, most) / length)
    shape = (len(rows) + random_rows, length)
    input_ids = torch.randint(vocabulary, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    targets = torch.full(shape, -100)
    selected = torch.zeros(shape, dtype=torch.bool)
    for index, (ids, supervised) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        mask[index, len(ids) :] = 0
        answer = torch.tensor(supervised, dtype=torch.bool)[1:]
        targets[index, : len(ids) - 1][answer] = torch.tensor(ids)[1:][answer]
        selected[index, : len(ids) - 1] = answer
    left = max(1, most - int(selected.sum()))
    free = torch.zeros(shape, dtype=torch.bool)
    free[len(rows) :] = True
    chosen = free.flatten().nonzero().flatten()
    every = math.ceil(len(chosen) / left)
    selected.view(-1)[chosen[::every]] = True
    return _Tokens(input_ids, mask, selected, targets[selected], len(rows))


def _test_rows(dataset: Artifact, most_positions: int) -> list[tuple[list[int], list[int]]]:
    from tuneline.data_prep.prepare import load_split

    split = load_split(dataset, "test")
    lengths = split.data.column("input_ids").combine_chunks().value_lengths().to_pylist()
    rows: list[tuple[list[int], list[int]]] = []
    positions, tokens = 0, 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        row = split[index]
        positions += sum(row["supervised"][1:])
        tokens += lengths[index]
        if positions > most_positions or tokens > _TEST_TOKENS * (1 if rows else 8):
            break
        rows.append((row["input_ids"], row["supervised"]))
    return rows


def _logits(model: Any, tokens: _Tokens) -> torch.Tensor:
    """(N, V) fp32, on CPU, of the selected positions only."""
    import torch

    def select(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = arguments
        return (hidden[tokens.selected.to(hidden.device)].unsqueeze(0), *rest)

    output = output_layer(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    handle = output.register_forward_pre_hook(select)
    try:
        with torch.inference_mode():
            logits = model.eval()(
                input_ids=tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device),
                use_cache=False,
            ).logits
    finally:
        handle.remove()
    return logits[0].float().cpu()


def _mean_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    total = 0.0
    for p, q in zip(expected.split(64), actual.split(64), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(expected)


def _tuned(
    subject: Subject, plan: Plan, merged: Path, tokens: _Tokens
) -> tuple[list[_Tensor], torch.Tensor, torch.Tensor]:
    """The comparison of tensors, and the logits of base and tuned model."""
    base, method, trust_code = subject.base, subject.method, subject.base.trusts_code
    folder = str(subject.adapter.path)
    if method.stored_as == "model":
        untuned = _logits(streamed(base.path, trust_code=trust_code), tokens)
        tuned = streamed(subject.adapter.path, trust_code=trust_code)
        return _compare_trained(subject, plan, merged), untuned, _logits(tuned, tokens)
    if subject.through is not None and subject.combined is None:
        loaded = load_base(base.path, trust_code=trust_code, quantization=subject.through)
        # before the first forward pass, after which kernels may keep weights in another order
        tensors = _compare_merged(subject, plan, merged, _dequantizing(loaded))
        untuned = _logits(loaded, tokens)
        return tensors, untuned, _logits(method.load(loaded, folder), tokens)
    if subject.combined is not None:
        return _tuned_by_several(subject, subject.combined, plan, merged, tokens)
    untuned = _logits(streamed(base.path, trust_code=trust_code), tokens)
    tensors = _compare_merged(subject, plan, merged, lambda name, weight: weight)
    tuned = streamed(
        base.path, trust_code=trust_code, attach=lambda model: method.load(model, folder)
    )
    return tensors, untuned, _logits(tuned, tokens)


def _tuned_by_several(
    subject: Subject,
    changes: Mapping[str, TensorChange],
    plan: Plan,
    merged: Path,
    tokens: _Tokens,
) -> tuple[list[_Tensor], torch.Tensor, torch.Tensor]:
    """PEFT has no adapter that is equal to them: the reference is the base plus their changes."""
    base, trust_code = subject.base, subject.base.trusts_code

    plain: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight  # noqa: E731
    if subject.through is not None:
        loaded = load_base(base.path, trust_code=trust_code, quantization=subject.through)
        plain = _dequantizing(loaded)

    def changed(name: str, weight: torch.Tensor) -> torch.Tensor:
        found, weight = changes.get(name), plain(name, weight)
        return weight if found is None else found.apply(weight.clone(), 0)

    tensors = _compare_merged(subject, plan, merged, plain)
    untuned = _logits(streamed(base.path, trust_code=trust_code, read=plain), tokens)
    tuned = streamed(base.path, trust_code=trust_code, read=changed)
    return tensors, untuned, _logits(tuned, tokens)


@dataclass(frozen=True)
class _Tensor:
    """One compared tensor."""

    name: str
    error: float
    lost_share: float

    def badness(self, limits: Limits) -> float:
        """Above 1 where a limit is broken."""
        worst = max(self.error / limits.tensor_error, self.lost_share / limits.lost_share)
        return worst if worst == worst else math.inf


def _compare(name: str, base: torch.Tensor, tuned: torch.Tensor, merged: torch.Tensor) -> _Tensor:
    sums = dict.fromkeys(("tuned", "missing", "change", "lost"), 0.0)
    flat = (tensor.reshape(-1).split(_COMPARED_ELEMENTS) for tensor in (base, tuned, merged))
    for before, after, got in zip(*flat, strict=True):
        missing = after - got
        sums["tuned"] += float(after.dot(after))
        sums["missing"] += float(missing.dot(missing))
        if base is not tuned:
            change = after - before
            sums["change"] += float(change.dot(change))
            sums["lost"] += float(missing.dot(change))
    error = math.sqrt(sums["missing"] / sums["tuned"]) if sums["tuned"] else sums["missing"]
    lost = sums["lost"] / sums["change"] if sums["change"] else 0.0
    return _Tensor(name, error, lost)


def _dequantizing(loaded: PreTrainedModel) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What bitsandbytes holds of each weight, in the file's orientation."""
    bits = four_bits.functional()
    parameters = dict(loaded.named_parameters())

    def read(name: str, weight: torch.Tensor) -> torch.Tensor:
        held: Any = parameters.get(name)
        state = getattr(held, "quant_state", None)
        if state is None:
            return weight
        plain = bits.dequantize_4bit(held.data, state).float().cpu()
        return plain if plain.shape == weight.shape and not _is_turned(loaded, name) else plain.T

    return read


def _is_turned(model: PreTrainedModel, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(name.rpartition(".")[0])
    return issubclass(getattr(module, "source_cls", object), Conv1D)


def _compare_merged(
    subject: Subject,
    plan: Plan,
    merged: Path,
    read: Callable[[str, torch.Tensor], torch.Tensor],
) -> list[_Tensor]:
    """Every tensor of the output against what PEFT makes of the base's.

    Args:
        subject: what was merged.
        plan: of the output.
        merged: its folder.
        read: what the tuned model's base holds for a weight, given its name and its stored value.
    """
    import torch

    skeleton = load_skeleton(subject.base.path, trust_code=subject.base.trusts_code)
    try:
        weights = Weights(skeleton, subject.base.path)
    except KeyError:
        return []  # names differ between files and memory: the logits have to do
    written = read_model(merged).tensors
    carried = {
        tensor.name: written[tensor.name]
        for file in plan.files
        for tensor in file.tensors
        if tensor.is_carried
    }
    own_names = {weights.stored(name).name: name for name in reversed(list(weights))}
    merging: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if subject.combined is None:
        merging = _pefts_merges(subject, skeleton, weights)
    compared = []
    for name, stored in read_merged(merged, plan):
        own = own_names.get(name)
        if own is None:
            continue
        # PEFT says what the adapter changes, not the plan, which may be what is wrong
        if name in carried and own not in merging and own not in (subject.combined or ()):
            same = same_bytes(weights.stored(own), carried[name])
            compared.append(_Tensor(name, 0.0 if same else math.inf, 0.0))
            continue
        base = read(own, weights[own])
        if subject.combined is not None:
            change = subject.combined.get(own)
            tuned = base if change is None else change.apply(base.clone(), 0)
        elif own in merging:
            tuned = merging[own](base.clone())
        elif name in plan.changed:
            continue  # a whole module of the adapter's own, which has nothing to be added to
        else:
            tuned = base
        value = stored()
        if value.shape == tuned.shape:
            with torch.inference_mode():
                compared.append(_compare(name, base, tuned, value))
    return compared


def _pefts_merges(
    subject: Subject, skeleton: PreTrainedModel, weights: Weights
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name of a weight or bias in the model -> what PEFT's own layer merges it into."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = subject.method.load(skeleton, str(subject.adapter.path))
    merges: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def merge(layer: Any, kind: str, name: str, value: torch.Tensor) -> torch.Tensor:
        base = layer.get_base_layer()
        held = dict(base.named_parameters(recurse=False))
        for key in held:
            real = value if key == kind else weights[f"{name}.{key}"]
            base.register_parameter(key, torch.nn.Parameter(real, requires_grad=False))
        with torch.no_grad():
            layer.merge()
        result = getattr(base, kind).data
        layer.merged_adapters.clear()
        for key, parameter in held.items():
            base.register_parameter(key, parameter)
        return result

    for full_name, module in tuned.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = plain_name(f"{full_name}.").removesuffix(".")
        for kind, _ in module.get_base_layer().named_parameters(recurse=False):
            merges[f"{name}.{kind}"] = lambda value, layer=module, kind=kind, name=name: merge(
                layer, kind, name, value
            )
    return merges


def _compare_trained(subject: Subject, plan: Plan, merged: Path) -> list[_Tensor]:
    trained, base = read_model(subject.adapter.path), read_model(subject.base.path)
    compared = []
    for name, value in read_merged(merged, plan):
        if name not in trained.tensors:
            continue
        tuned = read_tensor(trained.tensors[name]).float()
        before = read_tensor(base.tensors[name]).float() if name in base.tensors else tuned
        compared.append(_compare(name, before, tuned, value()))
    return compared


def read_merged(folder: Path, plan: Plan) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Each tensor of a merged model, to be read as fp32 in the base's orientation."""
    stored = read_model(folder).tensors
    for file in plan.files:
        for tensor in file.tensors:
            if tensor.dtype not in ("F32", "BF16", "F16"):
                continue
            if tensor.into is None:
                yield tensor.name, lambda name=tensor.name: read_tensor(stored[name]).float()
            else:
                yield tensor.name, lambda tensor=tensor: _read_4bit(stored, tensor)


def _read_4bit(stored: Mapping[str, StoredTensor], tensor: PlannedTensor) -> torch.Tensor:
    from safetensors import safe_open

    bits = four_bits.functional()
    with safe_open(stored[tensor.name].file, "pt") as reader:
        packed = reader.get_tensor(tensor.name)
        prefix = f"{tensor.name}."
        state = {key: reader.get_tensor(key) for key in stored if key.startswith(prefix)}
    device = packed.device
    plain = bits.dequantize_4bit(packed, bits.QuantState.from_dict(state, device)).float()
    return plain.T if tensor.turned else plain
