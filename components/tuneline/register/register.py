"""MergedModel + EvalReport -> a version of a registered model in MLflow.

The version's files are an MLflow model of the `transformers` flavor around the merged folder, so
that `mlflow.transformers.load_model("models:/NAME@champion")` serves it. The MLmodel file is
written here: MLflow 3.17's own path for a local checkpoint fails with transformers 5 (its task
table holds names where MLflow expects classes), and its other path loads all weights into memory.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts
from tuneline.artifacts import Artifact
from tuneline.errors import ArtifactError
from tuneline.progress import report
from tuneline.tracking import TrackedStep, mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG: Final = "tuneline."
CHALLENGER: Final = "challenger"
_REQUIREMENTS: Final = ("torch", "transformers", "safetensors", "tokenizers", "accelerate")


def register(model_dir: Path, report_dir: Path, model_name: str, run_id: str, step: object) -> int:
    """Register once per pipeline run and content, however often the step is retried.

    Args:
        model_dir: a MergedModel.
        report_dir: the EvalReport of the adapter that was merged.
        model_name: of the registered model; created if it does not exist.
        run_id: of the pipeline run, empty outside of one.
        step: the tracked step whose run becomes the version's source, if there is one.

    Returns:
        The version's number.

    Raises:
        ArtifactError: model and report are not of the same adapter.
        RegistryError: MLflow refuses or can't be reached.
    """
    model = artifacts.load(model_dir, "merged_model")
    evaluation = artifacts.load(report_dir, "eval_report")
    if model.manifest.inputs["adapter"] != evaluation.manifest.inputs["adapter"]:
        raise ArtifactError(
            f"{report_dir} evaluates another adapter than the one merged in {model_dir}: a model "
            "is registered with its own evaluation only"
        )
    client = open_client()
    tags = _tags(model, evaluation, run_id)
    with mlflow_errors(f"registering {model_name}"):
        number = _existing(client, model_name, tags)
        if number is None:
            number = _create(client, model, model_name, tags, step)
            report(f"registered {model_name} version {number}")
        else:
            report(f"{model_name} version {number} is already this run's: nothing to register")
        client.set_registered_model_alias(model_name, CHALLENGER, str(number))
    return number


def _tags(model: Artifact, evaluation: Artifact, run_id: str) -> dict[str, str]:
    result = evaluation.read_json("report.json")
    proof = model.read_json("proof.json")
    base = model.manifest.base_model
    values = {
        "run_id": run_id,
        "model_digest": model.digest,
        "report_digest": evaluation.digest,
        "eval_set_digest": result["eval_set_digest"],
        "base_model": base["reference"],
        "base_model_revision": base["revision"],
        "base_model_digest": base["digest"],
        "method": model.manifest.config["method"]["name"],
        "gate": "passed" if result["verdict"]["passed"] else "refused",
        "gate_reasons": "; ".join(result["verdict"]["reasons"]),
        f"base_{result['metric']}": f"{result['base']:.4f}",
        f"tuned_{result['metric']}": f"{result['tuned']:.4f}",
        "merge_max_logit_diff": f"{proof['max_logit_diff']:.2e}",
        "merge_top1_agreement": f"{proof['top1_agreement']:.4f}",
    }
    return {TAG + key: value for key, value in values.items()}


def _existing(client: MlflowClient, model_name: str, tags: dict[str, str]) -> int | None:
    for found in client.search_model_versions(f"name = '{model_name}'"):
        keys = (f"{TAG}run_id", f"{TAG}model_digest", f"{TAG}report_digest")
        if all(found.tags.get(key) == tags[key] for key in keys):
            return int(found.version)
    return None


def _create(
    client: MlflowClient, model: Artifact, model_name: str, tags: dict[str, str], step: object
) -> int:
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    source_run = step.run_id if isinstance(step, TrackedStep) else None
    experiment_id = client.get_run(source_run).info.experiment_id if source_run else "0"
    logged = client.create_logged_model(
        experiment_id, name=model_name, source_run_id=source_run, tags=tags
    )
    with tempfile.TemporaryDirectory() as folder:
        _lay_out(model, Path(folder), source_run, logged.model_id)
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        model_name,
        source=logged.artifact_location,
        run_id=source_run,
        tags=tags,
        model_id=logged.model_id,
    )
    return int(created.version)


def _lay_out(model: Artifact, folder: Path, run_id: str | None, model_id: str) -> None:
    """An MLflow model around links to the merged files: nothing is copied before the upload."""
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    weights, tokenizer = folder / "model", folder / "components" / "tokenizer"
    weights.mkdir()
    tokenizer.mkdir(parents=True)
    for file in sorted(model.path.iterdir()):
        (weights / file.name).symlink_to(file.resolve())
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            (tokenizer / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = model.read_json("config.json")
    flavor = {
        "transformers_version": version("transformers"),
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": config["architectures"][0],
        "source_model_name": model.manifest.base_model["reference"],
        "model_binary": "model",
        "components": ["tokenizer"],
        "tokenizer_type": model.read_json("tokenizer_config.json").get(
            "tokenizer_class", "PreTrainedTokenizerFast"
        ),
    }
    text = Schema([ColSpec(DataType.string)])
    mlmodel = Model(
        artifact_path=model_id,
        model_id=model_id,
        run_id=run_id,
        signature=ModelSignature(inputs=text, outputs=text),
        metadata={"tuneline_manifest_digest": model.digest},
    )
    mlmodel.add_flavor("transformers", **flavor)
    mlmodel.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=_python_version(),
        env={"virtualenv": "python_env.yaml"},
    )
    mlmodel.save(str(folder / "MLmodel"))
    pinned = "".join(f"{name}=={version(name)}\n" for name in _REQUIREMENTS)
    (folder / "requirements.txt").write_text(pinned)
    (folder / "python_env.yaml").write_text(
        json.dumps({"python": _python_version(), "dependencies": ["-r requirements.txt"]})
    )


def _python_version() -> str:
    import platform

    return platform.python_version()
