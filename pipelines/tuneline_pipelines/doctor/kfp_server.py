"""Kubeflow Pipelines: reachable, of a version that fits, and what is published there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from tuneline import __version__
from tuneline.finetune.methods import METHODS
from tuneline_pipelines import client
from tuneline_pipelines.doctor.cluster import Cluster, names
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

if TYPE_CHECKING:
    from tuneline_pipelines.connection import Connection

PIPELINES: Final = (
    *(f"finetune-{method.name.replace('_', '-')}" for method in METHODS),
    "retrain",
    "compare",
    "promote",
)
"""What `tuneline publish` publishes."""
_DEPLOYMENT: Final = "ml-pipeline"


def reachable(connection: Connection) -> Finding:
    """Whether it answers, asked once.

    Raises:
        ClusterError: it does not; the message says what to do.
    """
    import kfp_server_api

    health = kfp_server_api.HealthzServiceApi(connection.client)
    answer = connection.attempt("reading the server's state", health.healthz_service_get_healthz)
    users = "users kept apart by namespace" if answer.multi_user else "one user"
    return ok("KFP", f"{connection.host}, {users}")


def version(cluster: Cluster, namespaces: Sequence[str]) -> Iterator[Finding]:
    """Of the API server, which its own API does not tell: that of its image.

    Args:
        cluster: that it runs in.
        namespaces: where it may be.
    """
    own = metadata.version("kfp")
    for namespace in dict.fromkeys(namespaces):
        found: Any = cluster.ask(
            "get",
            "deployments.apps",
            cluster.apps.read_namespaced_deployment,
            _DEPLOYMENT,
            namespace,
        )
        if found is None:
            continue
        image = found.spec.template.spec.containers[0].image
        tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
        if not tag[:1].isdigit():
            yield warning("KFP version", f"not to be told from {image}", f"it should be {own}'s")
        elif tag.split(".")[:2] != own.split(".")[:2]:
            yield warning(
                "KFP version",
                f"{tag}, and packages are compiled with {own}",
                "tuneline is tested with one minor version on both sides",
            )
        else:
            yield ok("KFP version", f"{tag}, in namespace {namespace}")
        return
    yield warning(
        "KFP version",
        f"no deployment {_DEPLOYMENT} in {names(namespaces)}",
        "KFP runs elsewhere, or not at all",
    )


def published(connection: Connection) -> tuple[list[client.Version], list[Finding]]:
    """The newest version of each pipeline of tuneline's, and what there is to say of them."""
    found = {name: client.published(connection, name) for name in PIPELINES}
    versions = [version for version in found.values() if version is not None]
    if not versions:
        return [], [warning("packages", "none is published", "tuneline publish")]
    findings: list[Finding] = []
    if missing := [name for name, version in found.items() if version is None]:
        findings.append(warning("packages", f"not published: {names(missing)}", "tuneline publish"))
    ours = f"{__version__}-"
    if old := [v.package.name for v in versions if not v.version_name.startswith(ours)]:
        findings.append(
            warning(
                "packages", f"not of this release ({__version__}): {names(old)}", "tuneline publish"
            )
        )
    return versions, findings or [ok("packages", f"{len(versions)} published")]


def images(used: dict[str, str]) -> Iterator[Finding]:
    """Whether what the pods run is named by digest.

    Args:
        used: image -> a pipeline that runs in it.
    """
    for image, pipeline in used.items():
        if "@sha256:" in image:
            yield ok("image", f"{image} ({pipeline})")
        elif image.rpartition("/")[2].partition(":")[2] in ("", "latest"):
            yield error(
                "image",
                f"{image} ({pipeline}) is a different one from day to day",
                "compile with TUNELINE_IMAGES=images.lock, which `make push-images` writes",
            )
        else:
            yield warning(
                "image",
                f"{image} ({pipeline}) is a tag, which can move",
                "compile with TUNELINE_IMAGES=images.lock, which `make push-images` writes",
            )
