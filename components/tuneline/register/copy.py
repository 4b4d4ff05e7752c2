"""A champion from one registered model to another: from staging to production.

The copy is a version of its own that names the same files; nothing is uploaded again. It carries
the tags of its source, and is promoted in the other model by the same rules and under that model's
own history.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tuneline.errors import RegistryError
from tuneline.progress import report
from tuneline.register import tags
from tuneline.register.champion import find_version
from tuneline.register.promote import Promotion, Request, promote
from tuneline.register.verify import label
from tuneline.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def copy_and_promote(model_name: str, to_model: str, request: Request) -> Promotion:
    """Copy the champion `request.version` to another registered model and promote the copy.

    The copy is made once, and its files are verified before it is promoted. It needs no approval
    of its own: where one was required, its source would not be champion without.

    Raises:
        RegistryError: as `tuneline.register.promote.promote`.
    """
    client = open_client()
    with mlflow_errors(f"copying {model_name} version {request.version} to {to_model}"):
        source = find_version(client, model_name, request.version)
        number = _copy(client, source, to_model)
    # what was expected was said of the first model
    return promote(to_model, replace(request, version=number, expect_champion=None))


def _copy(client: MlflowClient, source: ModelVersion, to_model: str) -> int:
    from mlflow.exceptions import MlflowException

    described = {
        **source.tags,
        tags.COPIED_FROM: f"models:/{source.name}/{source.version}",
        tags.APPROVAL_REQUIRED: "false",
    }
    if (there := _existing(client, to_model, described)) is not None:
        report(f"{to_model} version {there} is the copy of {label(source)}")
        return there
    try:
        client.create_registered_model(to_model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        to_model,
        source=f"models:/{source.name}/{source.version}",
        run_id=source.run_id or None,
        tags=described,
        description=source.description,
        await_creation_for=0,
    )
    # a second copy, by a request that MLflow's client repeated or by another process
    first = _existing(client, to_model, described)
    if first is None:
        raise RegistryError(f"{to_model} does not keep the copy of {label(source)}")
    if first < int(created.version):
        client.delete_model_version(to_model, created.version)
    report(f"copied {label(source)} to {to_model} version {first}")
    return first


def _existing(client: MlflowClient, to_model: str, described: dict[str, str]) -> int | None:
    keys = (tags.COPIED_FROM, tags.MODEL_DIGEST, tags.REPORT_DIGEST)
    same = [
        int(found.version)
        for found in client.search_model_versions(f"name = '{to_model}'")
        if all(found.tags.get(key) == described.get(key) for key in keys)
    ]
    return min(same, default=None)
