"""Make a registered version the champion, if its evaluation says so and it loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline import artifacts
from tuneline.errors import RegistryError
from tuneline.progress import report
from tuneline.register.register import TAG
from tuneline.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION: Final = "champion"
PREVIOUS: Final = "previous"


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion: the alias is empty when it was refused."""

    version: int
    alias: str
    reason: str


def promote(model_name: str, version: int) -> Promotion:
    """Move the alias `champion` to a version whose gate passed; the champion before becomes
    `previous`.

    A version whose gate refused it is not an error: the registry stays as it is, and the reason
    is in the answer.

    Raises:
        RegistryError: no such model or version, a version without a verdict, files that differ
            from their digest, or a model that does not load.
    """
    client = open_client()
    with mlflow_errors(f"promoting {model_name} version {version}"):
        found = client.get_model_version(model_name, str(version))
        gate = found.tags.get(f"{TAG}gate")
        if gate == "refused":
            reason = found.tags.get(f"{TAG}gate_reasons", "")
            report(f"{model_name} version {version} is not promoted: {reason}")
            return Promotion(version, "", reason)
        if gate != "passed":
            raise RegistryError(
                f"{model_name} version {version} has no verdict of a gate: register it with "
                "`tuneline register`"
            )
        check_loads(client, found)
        _move(client, model_name, version)
    report(f"{model_name} version {version} is {CHAMPION}")
    return Promotion(version, CHAMPION, "")


def _move(client: MlflowClient, model_name: str, version: int) -> None:
    aliases = client.get_registered_model(model_name).aliases
    before = aliases.get(CHAMPION)
    if before is not None and int(before) != version:
        client.set_registered_model_alias(model_name, PREVIOUS, str(before))
    client.set_registered_model_alias(model_name, CHAMPION, str(version))


def check_loads(client: MlflowClient, version: ModelVersion) -> None:
    """Verify the files against their manifest, load the model and run one token through it.

    Raises:
        RegistryError: it does not hold.
    """
    import mlflow.artifacts
    import torch

    from tuneline.base_model import digest_of_code
    from tuneline.errors import ArtifactError
    from tuneline.finetune.load import load_base

    uri = client.get_model_version_download_uri(version.name, version.version)
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/model"))
    try:
        model = artifacts.load(folder, "merged_model")
    except ArtifactError as error:
        raise RegistryError(f"{version.name} version {version.version}: {error}") from error
    if model.digest != version.tags.get(f"{TAG}model_digest"):
        raise RegistryError(
            f"{version.name} version {version.version}: its files are not the registered ones "
            f"({model.digest[:19]}): register the model again"
        )
    code = model.manifest.base_model.get("code", "")
    if code and digest_of_code(folder) != code:
        raise RegistryError(
            f"{version.name} version {version.version}: its Python code is not the pinned {code}: "
            "register the model again"
        )
    with torch.inference_mode():
        loaded = load_base(folder, trust_code=bool(code))
        logits = loaded(torch.tensor([[0]], device=loaded.device)).logits
    if not bool(logits.isfinite().all()):
        raise RegistryError(f"{version.name} version {version.version}: its logits are not finite")
