"""An artifact as an MLflow model: which files a version has, and what is checked when it is loaded.

A version's folder:

    MLmodel, requirements.txt, python_env.yaml, *input_example.json   written here
    model/                the artifact, byte by byte, with its manifest
    components/tokenizer/ links to the artifact's tokenizer files, where the flavor wants them
    evaluation/           the EvalReport

The files below `model/` and `evaluation/` are proven by their manifests, all others by
`package_digest`: MLmodel names the Python module that loads the model, so it must not change.

MLflow 3.17's own way of saving a local checkpoint fails with transformers 5 (its task table holds
names where MLflow expects classes), and its other way loads all weights into memory. So the
MLmodel file of the `transformers` flavor is written here, around links: nothing is copied before
the upload.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts
from tuneline.artifacts import MANIFEST, Artifact, Kind, digest_of, digest_of_file
from tuneline.errors import ArtifactError, RegistryError
from tuneline.register import packaged

if TYPE_CHECKING:
    from mlflow.models import Model

MODEL: Final = "model"
EVALUATION: Final = "evaluation"
_REQUIREMENTS: Final = ("torch", "transformers", "safetensors", "tokenizers", "accelerate")
_TOKENIZER_SUFFIXES: Final = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Package:
    """How one kind of artifact becomes a version."""

    kind: Kind
    add_flavors: Callable[[Artifact, Path, Model], None]
    """Adds flavors to the MLmodel, and to the folder what they need beside `model/`."""
    check_loads: Callable[[Path], None]
    """Loads `model/` and runs it. Raises RegistryError or ModelError if it can't."""
    requirements: Callable[[Artifact], dict[str, str]]
    """What a process needs that loads it: distribution to version."""


def _add_transformers(model: Artifact, folder: Path, mlmodel: Model) -> None:
    tokenizer = folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in sorted(model.path.iterdir()):
        if file.suffix in _TOKENIZER_SUFFIXES and file.name != MANIFEST:
            (tokenizer / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = model.read_json("config.json")
    mlmodel.add_flavor(
        "transformers",
        transformers_version=version("transformers"),
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        source_model_name=model.manifest.base_model["reference"],
        model_binary=MODEL,
        components=["tokenizer"],
        tokenizer_type=model.read_json("tokenizer_config.json").get(
            "tokenizer_class", "PreTrainedTokenizerFast"
        ),
    )
    mlmodel.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=platform.python_version(),
        env={"virtualenv": "python_env.yaml"},
    )


def _check_merged_loads(folder: Path) -> None:
    import torch

    from tuneline.base_model import digest_of_code
    from tuneline.finetune.load import load_base

    code = artifacts.load(folder, "merged_model").manifest.base_model.get("code", "")
    if code and digest_of_code(folder) != code:
        raise RegistryError(f"its Python code is not the pinned {code}")
    with torch.inference_mode():
        loaded = load_base(folder, trust_code=bool(code))
        logits = loaded(torch.tensor([[0]], device=loaded.device)).logits
    if not bool(logits.isfinite().all()):
        raise RegistryError("its logits are not finite")


def _requirements(model: Artifact) -> dict[str, str]:
    del model
    return {name: version(name) for name in _REQUIREMENTS}


PACKAGES: Final = (
    Package("merged_model", _add_transformers, _check_merged_loads, _requirements),
    Package("packaged_model", packaged.add_flavors, packaged.check_loads, packaged.requirements),
)


def package_of(folder: Path) -> Package:
    """The package for the kind of artifact in a folder.

    Raises:
        ArtifactError: no manifest, or a kind that can't be registered.
    """
    kinds = ", ".join(package.kind for package in PACKAGES)
    try:
        kind = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not a finished {kinds}: it has no {MANIFEST}; "
            "give the output folder of the step that makes one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / MANIFEST} can't be read: {error}") from error
    for package in PACKAGES:
        if package.kind == kind:
            return package
    raise ArtifactError(f"{folder} is a {kind}; these can be registered: {kinds}")


def lay_out(
    package: Package, model: Artifact, evaluation: Artifact, folder: Path, model_id: str
) -> str:
    """Fill an empty folder with the version's files; big ones are links.

    Returns:
        The package digest.
    """
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    for name, artifact in ((MODEL, model), (EVALUATION, evaluation)):
        for file in sorted(p for p in artifact.path.rglob("*") if p.is_file()):
            link = folder / name / file.relative_to(artifact.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    text = Schema([ColSpec(DataType.string)])
    mlmodel = Model(
        artifact_path=model_id,
        model_id=model_id,
        signature=ModelSignature(inputs=text, outputs=text),
        saved_input_example_info=_write_example(folder, evaluation),
        metadata={"tuneline_manifest_digest": model.digest},
        # a retry writes the same file, so that what it finds uploaded needs no second upload
        utc_time_created="1970-01-01 00:00:00.000000",
        model_uuid=model_id,
    )
    package.add_flavors(model, folder, mlmodel)
    mlmodel.save(str(folder / "MLmodel"))
    needed = package.requirements(model).items()
    (folder / "requirements.txt").write_text("".join(f"{k}=={v}\n" for k, v in needed))
    (folder / "python_env.yaml").write_text(
        json.dumps({"python": platform.python_version(), "dependencies": ["-r requirements.txt"]})
    )
    return digest_of_package(folder)


def _write_example(folder: Path, evaluation: Artifact) -> dict[str, str]:
    """A real question of the test split, in the two forms that MLflow reads."""
    samples = evaluation.read_json("report.json").get("samples") or [{"question": "Hello"}]
    question = samples[0]["question"]
    (folder / "input_example.json").write_text(json.dumps([question]))
    (folder / "serving_input_example.json").write_text(json.dumps({"inputs": [question]}))
    return {
        "artifact_path": "input_example.json",
        "type": "json_object",
        "serving_input_path": "serving_input_example.json",
    }


def digest_of_package(folder: Path) -> str:
    """Digest over all files of a version that no manifest proves."""
    return digest_of(
        {
            path.relative_to(folder).as_posix(): digest_of_file(path)
            for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] not in (MODEL, EVALUATION)
        }
    )
