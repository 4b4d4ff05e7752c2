"""What has to hold of a registered version before it may serve: its files, its report, its load."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline import artifacts
from tuneline.errors import ArtifactError, ModelError, RegistryError
from tuneline.register import tags
from tuneline.register.package import EVALUATION, MODEL, digest_of_package, package_of
from tuneline.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def verify(client: MlflowClient, version: ModelVersion) -> None:
    """Fetch the version, check every byte against what was registered, and load the model.

    Where the artifacts are a folder of this machine, they are read in place; else they need their
    size in temporary space (`TMPDIR`).

    Raises:
        RegistryError: a file is missing, was changed or added, the report is not the registered
            one or says something else than the version's tags, or the model does not load.
    """
    with fetched(client, version) as folder:
        try:
            package = package_of(folder / MODEL)
            model = artifacts.load(folder / MODEL, package.kind)
            evaluation = artifacts.load(folder / EVALUATION, "eval_report")
        except ArtifactError as error:
            raise RegistryError(f"{label(version)}: {error}") from error
        found = {
            **tags.describe(model, evaluation),
            tags.PACKAGE_DIGEST: digest_of_package(folder),
        }
        for key, value in found.items():
            if (stated := version.tags.get(key)) != value:
                raise RegistryError(
                    f"{label(version)} is not what was registered: its tag {key} says "
                    f"'{_short(stated)}', its files say '{_short(value)}'. Register the model again"
                )
        if evaluation.manifest.inputs["adapter"] != model.manifest.inputs["adapter"]:
            raise RegistryError(f"{label(version)}: its evaluation report is of another model")
        try:
            package.check_loads(folder / MODEL)
        except (RegistryError, ModelError) as error:
            raise RegistryError(f"{label(version)} does not load: {error}") from error


def label(version: ModelVersion) -> str:
    """`NAME version N`."""
    return f"{version.name} version {version.version}"


def _short(value: str | None) -> str:
    return "nothing" if value is None else value[:60]


@contextmanager
def fetched(client: MlflowClient, version: ModelVersion) -> Iterator[Path]:
    """The files of a version; those of a remote store in temporary space (`TMPDIR`) for the block.

    Raises:
        RegistryError: there are none.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    uri = client.get_model_version_download_uri(version.name, version.version)
    if is_local_uri(uri):
        folder = Path(local_file_uri_to_path(uri))
        if not folder.is_dir():
            raise RegistryError(_gone(version, uri))
        yield folder
        return
    aside = Path(tempfile.mkdtemp(prefix="tuneline-verify-"))
    try:
        with mlflow_errors(f"fetching {label(version)}"):
            folder = Path(download_artifacts(artifact_uri=uri, dst_path=str(aside)))
        if not any(path.is_file() for path in folder.rglob("*")):
            raise RegistryError(_gone(version, uri))
        yield folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _gone(version: ModelVersion, uri: str) -> str:
    return f"{label(version)} has no files at {uri}: they were deleted; register the model again"
