"""Base + Adapter -> MergedModel, a few rows at a time, and proof that it computes the same.

The base's safetensors files are read and written in pieces, so that memory does not grow with the
model; names, shapes, dtypes and files stay what they were unless the export asks for others. That
the base is the one that the adapter was trained on is checked beside the merging, from its bytes.
A merge that is killed goes on where it was.

What has no form as weights is packaged instead (`package.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import __version__, artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.errors import ArtifactError, MergeError, Terminated
from tuneline.evaluate.evaluate import check_lineage
from tuneline.finetune.load import bitsandbytes_config, compute_dtype, load_skeleton
from tuneline.finetune.methods import METHODS, Method
from tuneline.finetune.methods.method import MethodSettings, Quantization, TensorChange
from tuneline.merge.combine import combine
from tuneline.merge.four_bit import quantized_weights
from tuneline.merge.model_card import BASE_CARD, card
from tuneline.merge.package import write_package
from tuneline.merge.plan import CODES, INDEX, Embeddings, NoSuchTensorError, Plan, plan_merge
from tuneline.merge.proof import Subject, prove
from tuneline.merge.stored import FLOATS, read_file, read_model
from tuneline.merge.stream import Journal, write_files
from tuneline.progress import report, tick
from tuneline.recipe import (
    ExportSection,
    check_export,
    check_form,
    method_of,
    method_settings,
    of_weights,
)
from tuneline.tracking import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROOF: Final = "proof.json"


@dataclass(frozen=True)
class _Job:
    """What is merged into what."""

    base: BaseModel
    adapters: tuple[Artifact, ...]
    export: ExportSection
    method: Method
    settings: MethodSettings

    @property
    def source(self) -> Path:
        """Folder of the weights that are read."""
        whole = self.method.stored_as == "model"
        return self.adapters[0].path if whole else self.base.path

    @property
    def through(self) -> Quantization | None:
        """The 4 bits that the base's weights go through first."""
        dequantized = self.export.quantized_base == "dequantized"
        return self.settings.quantization if dequantized else None

    def key(self) -> str:
        """Identity of the merge; the files' times stand for bytes that are checked later."""
        return artifacts.digest_of(
            {
                "tuneline": __version__,
                "adapters": [adapter.digest for adapter in self.adapters],
                "export": self.export.model_dump(mode="json"),
                "base": self.base.identity(),
                "compute_dtype": str(compute_dtype()),
                "files": [
                    [p.name, p.stat().st_size, p.stat().st_mtime_ns]
                    for p in base_model.weight_files(self.source)
                ],
            }
        )


def merge(
    model_reference: str,
    adapter_dir: Path,
    export: ExportSection,
    output: Path,
    step: Step,
    *,
    also: Sequence[Path] = (),
    dataset_dir: Path | None = None,
    report_dir: Path | None = None,
) -> Artifact:
    """Write the tuned model in the form that `export` asks for.

    Args:
        model_reference: the base.
        adapter_dir: an Adapter.
        export: form, dtype, 4 bits, file sizes, how several adapters become one.
        output: folder of the artifact.
        step: where the proof's figures are tracked.
        also: more Adapters, of the same base, to be combined with the first.
        dataset_dir: the PreparedDataset that it was trained on; the proof then covers its test
            split.
        report_dir: the EvalReport of the adapter, for the model card.

    Returns:
        An artifact of kind `merged_model` or `packaged_model`.

    Raises:
        ArtifactError: an adapter was trained on another base, or the base changed since.
        MergeError: it can't be merged, or the proof fails; the adapter is kept.
        RecipeError: the export does not fit the method.
    """
    adapter = artifacts.load(adapter_dir, "adapter")
    others = [artifacts.load(path, "adapter") for path in also]
    settings = method_settings(adapter.manifest.config["method"])
    method = method_of(settings)
    check_form(settings, export.form, source="merge")
    check_export(settings, export, source="merge")
    base = base_model.resolve(model_reference, digest=adapter.manifest.base_model["digest"])
    check = _BaseCheck(base, adapter)
    for other in others:
        check_lineage(other, base, None)
    dataset = None
    if dataset_dir is not None:
        dataset = artifacts.load(dataset_dir, "prepared_dataset")
        check_lineage(adapter, base, dataset)
    facts = _scores(report_dir, adapter)
    job = _Job(base, (adapter, *others), export, method, settings)
    try:
        changes = _changes(job)
        plan = plan_of(job, changes)
    except NoSuchTensorError as error:
        if export.form == "merged":
            raise
        return _package(job, f"not merged: {error}", check, output, facts)
    except _NotMergeableError as error:
        return _package(job, f"not merged: {error}", check, output, facts)
    key = job.key()
    with (
        artifacts.writing(output, resumes=lambda aside: Journal.belongs(aside, key)) as aside,
        Journal(aside, key) as journal,
    ):
        try:
            _write(job, plan, aside, journal, check)
        except Terminated as stopped:
            raise Terminated(
                f"{len(journal.finished)} of {len(plan.files)} files are finished and kept in "
                f"{aside}; run it again to go on"
            ) from stopped
        subject = Subject(
            base=base,
            adapter=adapter,
            method=method,
            settings=settings,
            through=job.through,
            combined=changes if others or export.weights else None,
        )
        proof = prove(subject, plan, aside, dataset=dataset, identical=_is_copy(job, plan))
        facts |= {"merge proof": proof.sentence()}
        _write_card(job, aside, output.name, facts)
        (aside / PROOF).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")
        journal.complete()
        manifest = artifacts.seal(
            aside,
            kind="merged_model",
            config=adapter.manifest.config
            | {"export": export.model_dump(mode="json"), "merge_proof": asdict(proof)},
            base_model=base.identity(),
            inputs=_inputs(job),
            hashed=journal.finished,
        )
    step.log_metrics({f"merge_{name}": value for name, value in proof.metrics().items()})
    report(f"proof: {proof.sentence()}")
    return Artifact(output, manifest)


class _NotMergeableError(Exception):
    """The method has no form as weights, or the export asks for a package."""


def _changes(job: _Job) -> dict[str, TensorChange]:
    method, export = job.method, job.export
    if method.stored_as == "model":
        if len(job.adapters) > 1:
            raise MergeError(f"method {method.name} can't be combined with other adapters")
        return {}
    if export.form == "packaged":
        if len(job.adapters) > 1:
            raise MergeError("several adapters can't be packaged as one: merge them")
        raise _NotMergeableError("a package was asked for")
    if method.open_merge is None:
        mergeable = ", ".join(m.name for m in METHODS if m.mergeable)
        raise _NotMergeableError(
            f"the change of method {method.name} has no equal form in weights (these have: "
            f"{mergeable})"
        )
    opened = []
    for adapter in job.adapters:
        settings = method_settings(adapter.manifest.config["method"])
        one = method_of(settings)
        if one.open_merge is None or one.stored_as == "model":
            raise MergeError(f"{adapter.path}: method {one.name} can't be combined with others")
        if settings.quantization != job.settings.quantization:
            raise MergeError(
                f"{adapter.path} was trained on the base in another precision than "
                f"{job.adapters[0].path}: they have no weights in common to be merged into"
            )
        opened.append(one.open_merge(str(adapter.path)))
    return combine(opened, export)


def plan_of(job: _Job, changes: Mapping[str, TensorChange]) -> Plan:
    """Where every tensor goes.

    Raises:
        NoSuchTensorError: the base has no tensor that the adapter changes.
        MergeError: something does not fit.
    """
    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    if stored_as := (config.get("quantization_config") or {}).get("quant_method"):
        raise MergeError(
            f"{job.base.reference} is stored quantized ({stored_as}): its weights can't be changed "
            "without losing the change to rounding; train on the full-precision model, or export "
            "with form packaged"
        )
    into = Quantization() if job.export.quantization == "nf4" else None
    four_bit: Mapping[str, bool] = {}
    if kind := into or job.settings.quantization:
        four_bit = quantized_weights(job.source, kind, trust_code=job.base.trusts_code)
    skeleton = load_skeleton(job.source, trust_code=job.base.trusts_code)
    return plan_merge(
        read_model(job.source),
        changes,
        job.export,
        embeddings=_embeddings(skeleton),
        four_bit=four_bit,
        through=job.through,
        trained_on_4bit=job.settings.quantization is not None,
    )


def _embeddings(model: PreTrainedModel) -> Embeddings:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = outputs is not None and outputs.weight is inputs.weight
    return Embeddings(
        inputs=f"{names[id(inputs)]}.weight",
        outputs=f"{names[id(outputs)]}.weight" if outputs is not None else "lm_head.weight",
        tied=tied,
    )


class _BaseCheck:
    """Hashes the base beside the merging."""

    def __init__(self, base: BaseModel, adapter: Artifact) -> None:
        self._base, self._adapter = base, adapter
        self._digest: str | OSError = ""
        # a daemon: a step that is stopped does not wait for the rest of 140 GB
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()

    def _hash(self) -> None:
        try:
            self._digest = base_model.digest_of_model(self._base.path, self._base.code)
        except OSError as error:
            self._digest = error

    def poll(self) -> None:
        """Raise as soon as it is known that the base is another.

        Raises:
            ArtifactError: it is not what the adapter was trained on.
            OSError: it can't be read.
        """
        if self._thread.is_alive():
            return
        if isinstance(self._digest, OSError):
            raise self._digest
        if self._digest != self._base.digest:
            trained_on = self._adapter.manifest.base_model
            raise ArtifactError(
                f"{self._adapter.path} was trained on {trained_on['reference']} "
                f"({trained_on['digest'][:19]}), not on {self._base.reference} "
                f"({self._digest[:19]}): give the base it was trained on; if that is its name, "
                "its files have changed since"
            )

    def wait(self) -> None:
        """Like `poll`, but until it is known."""
        self._thread.join()
        self.poll()


def _write(job: _Job, plan: Plan, aside: Path, journal: Journal, check: _BaseCheck) -> None:
    """Weights and what travels with them."""
    if journal.finished:
        report(f"going on after {len(journal.finished)} of {len(plan.files)} files")
    if _is_copy(job, plan):
        _link_files(job, plan, aside, journal)
    else:
        total = sum(tensor.size_bytes for file in plan.files for tensor in file.tensors)
        done = 0

        def on_tensor(tensor: Any) -> None:
            nonlocal done
            check.poll()
            if (done + tensor.size_bytes) * 10 // total > done * 10 // total:
                tick(f"merging: {(done + tensor.size_bytes) / total:.0%}")
            done += tensor.size_bytes

        write_files(plan.files, aside, journal, on_tensor)
    check.wait()
    _write_small_files(job, plan, aside)
    report(f"merged: {len(plan.changed)} tensors changed, {len(plan.files)} weight files")


def _is_copy(job: _Job, plan: Plan) -> bool:
    """Whether the output's weight files are the source's, byte for byte."""
    return job.method.stored_as == "model" and all(
        file.name in job.adapters[0].manifest.files
        and all(tensor.is_carried for tensor in file.tensors)
        for file in plan.files
    ) and job.export.max_shard_size_gb is None  # fmt: skip


def _link_files(job: _Job, plan: Plan, aside: Path, journal: Journal) -> None:
    for file in plan.files:
        if file.name in journal.finished:
            continue
        source = job.source / file.name
        try:
            if source.stat().st_uid != os.geteuid():  # a link's mode could not be set
                raise PermissionError
            os.link(source, aside / file.name)
        except OSError:  # another owner or file system, or one without links
            shutil.copyfile(source, aside / file.name)
            with (aside / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
        journal.add(file.name, job.adapters[0].manifest.files[file.name])


def _write_small_files(job: _Job, plan: Plan, aside: Path) -> None:
    # an adapter that added tokens brings its tokenizer
    if job.method.stored_as == "adapter":
        for file in job.adapters[0].path.iterdir():
            if "token" in file.name or file.name.startswith(("chat_template", "vocab", "merges")):
                shutil.copyfile(file, aside / file.name)
    base_model.copy_small_files(job.source, aside)
    if (aside / "README.md").exists():
        (aside / "README.md").rename(aside / BASE_CARD)
    path = aside / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = dict(config)
    if plan.vocabulary is not None:
        keys = ("vocab_size", "padded_vocab_size")
        config |= {key: plan.vocabulary for key in keys if key in config}
    if plan.unties:
        config["tie_word_embeddings"] = False
    if job.export.dtype != "keep":
        name = FLOATS[CODES[job.export.dtype]]
        config |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {
            "dtype": name
        }
    if job.export.quantization == "nf4":
        quantization = bitsandbytes_config(Quantization(), compute_dtype())
        config["quantization_config"] = quantization.to_dict()
    if config != before:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(plan.files) > 1:
        files = [read_file(aside / file.name) for file in plan.files]
        index = {
            "metadata": {
                "total_size": sum(tensor.size_bytes for file in files for tensor in file.tensors)
            },
            "weight_map": {
                tensor.name: file.path.name for file in files for tensor in file.tensors
            },
        }
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _inputs(job: _Job) -> dict[str, str]:
    first, *others = job.adapters
    return {"adapter": first.digest} | {
        f"adapter_{number}": other.digest for number, other in enumerate(others, 2)
    }


def _package(
    job: _Job, reason: str, check: _BaseCheck, output: Path, facts: dict[str, Any]
) -> Artifact:
    adapter, base = job.adapters[0], job.base
    check.wait()
    with artifacts.writing(output) as aside:
        write_package(base, adapter, reason, aside, output.name, facts)
        manifest = artifacts.seal(
            aside,
            kind="packaged_model",
            config=adapter.manifest.config | {"export": job.export.model_dump(mode="json")},
            base_model=base.identity(),
            inputs=_inputs(job),
        )
    base_model.remember(base)
    if unused := of_weights(job.export):
        report(f"export.{', export.'.join(unused)} has no effect on a package")
    report(f"packaged as base reference and adapter; {reason}")
    return Artifact(output, manifest)


def _write_card(job: _Job, aside: Path, name: str, facts: dict[str, Any]) -> None:
    trust = ", trust_remote_code=True" if job.base.trusts_code else ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{trust})\n"
    )
    text = card(job.base, job.adapters[0], facts, code=code)
    (aside / "README.md").write_text(text, encoding="utf-8")


def _scores(report_dir: Path | None, adapter: Artifact) -> dict[str, Any]:
    if report_dir is None:
        return {}
    evaluation = artifacts.load(report_dir, "eval_report")
    if evaluation.manifest.inputs["adapter"] != adapter.digest:
        raise ArtifactError(
            f"{report_dir} evaluates another adapter than {adapter.path}: give its own report"
        )
    result = evaluation.read_json("report.json")
    verdict = "passed" if result["verdict"]["passed"] else "refused"
    return {
        f"{result['metric']}, base": result["base"],
        f"{result['metric']}, tuned": result["tuned"],
        "test rows": result["rows"],
        "gate": verdict,
    }
