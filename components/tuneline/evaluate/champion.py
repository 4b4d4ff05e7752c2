"""The current champion of a registered model, fetched to be evaluated on the challenger's rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts
from tuneline.artifacts import MANIFEST, Artifact
from tuneline.errors import ArtifactError, RegistryError
from tuneline.progress import report
from tuneline.register import tags
from tuneline.register.champion import CHAMPION
from tuneline.register.package import MODEL
from tuneline.register.verify import fetched, label
from tuneline.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from peft import PeftModel
    from transformers import PreTrainedModel

_KINDS: Final = ("merged_model", "packaged_model")


@dataclass(frozen=True)
class Champion:
    """A registered version whose files are the registered ones."""

    name: str
    version: int
    artifact: Artifact

    @property
    def digest(self) -> str:
        """Of the model's manifest, as its version is tagged."""
        return self.artifact.digest

    def load(self, *, trust_code: bool) -> PreTrainedModel | PeftModel:
        """The model on its device; a package on the base that it names.

        Args:
            trust_code: run the pinned code that the model shares with the base.

        Raises:
            ModelError: the weights can't be loaded, or a package's base is not to be found.
            ArtifactError: the base of a package is another.
        """
        from tuneline.finetune.load import load_base
        from tuneline.merge.package import load_packaged

        if self.artifact.manifest.kind == "packaged_model":
            return load_packaged(self.artifact.path)[0]
        return load_base(self.artifact.path, trust_code=trust_code)


@contextmanager
def current_champion(model_name: str) -> Iterator[Champion | None]:
    """The version that the alias `champion` names; None where there is none.

    Files of a store on this machine are read in place; others need their size in temporary space
    (`TMPDIR`) while the block runs.

    Raises:
        RegistryError: MLflow can't be reached, or the files are not what was registered.
    """
    client = open_client()
    version = _find(client, model_name)
    if version is None:
        report(f"{model_name} has no champion yet: compared with the base only")
        yield None
        return
    what = f"{label(version)} (alias {CHAMPION})"
    with fetched(client, version) as folder:
        try:
            artifact = _verified(folder / MODEL)
        except ArtifactError as error:
            raise RegistryError(
                f"{what}: {error}. Roll back to a whole version, or set gate.champion: ignore"
            ) from error
        stated = version.tags.get(tags.MODEL_DIGEST)
        if artifact.digest != stated:
            raise RegistryError(
                f"{what}: its files ({artifact.digest[:19]}) are not the registered ones "
                f"({str(stated)[:19]}). Roll back to a whole version, or set gate.champion: ignore"
            )
        yield Champion(model_name, int(version.version), artifact)


def _find(client: MlflowClient, model_name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    with mlflow_errors(f"looking for the champion of {model_name}"):
        try:
            return client.get_model_version_by_alias(model_name, CHAMPION)
        except MlflowException as error:
            # no such model; a model without that alias
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _verified(folder: Path) -> Artifact:
    try:
        kind: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / MANIFEST} can't be read: {error}") from error
    if kind not in _KINDS:
        raise ArtifactError(f"a {kind} can't be evaluated; these can: {', '.join(_KINDS)}")
    return artifacts.load(folder, kind)


def why_not_comparable(champion_tokenizer: Any, tokenizer: Any) -> str:
    """Why a champion can't read the rows as they were rendered for another base; empty if it can.

    Rows are rendered and tokenized once, for the challenger's base. Another template or vocabulary
    would be asked in a language that it was not tuned on, and lose without a cause.
    """
    if champion_tokenizer.get_vocab() != tokenizer.get_vocab():
        return "it has another vocabulary"
    if champion_tokenizer.chat_template != tokenizer.chat_template:
        return "it has another chat template"
    return ""
