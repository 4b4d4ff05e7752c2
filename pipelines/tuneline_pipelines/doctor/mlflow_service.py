"""The MLflow that the pods are pointed to. An address inside of the cluster is asked through the
API server, since it has no meaning elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from tuneline_pipelines.doctor import mlflow_server
from tuneline_pipelines.doctor.cluster import Cluster, names, shown
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

_NAME: Final = "MLflow of the pods"


@dataclass(frozen=True)
class Answer:
    """What is known of it."""

    findings: list[Finding]
    wants_login: bool | None = None
    """None: not known."""


def look(cluster: Cluster, uri: str) -> Answer:
    """Whether the server answers, and whether it wants a login.

    Args:
        cluster: that the pods are in.
        uri: as the config map has it.

    Raises:
        Denied: this login may not look at services.
    """
    parts = urlsplit(uri)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        return Answer([error(_NAME, f"{shown(uri)} is no http address", "correct the config map")])
    service, inside = _service(cluster, host)
    if service is None and inside:
        return Answer(
            [
                error(
                    _NAME,
                    f"{shown(uri)}: there is no service {inside}",
                    "correct the config map, or start MLflow",
                )
            ]
        )
    if service is None:
        found = mlflow_server.reachable(uri, name=_NAME)
        if found.level == "error":  # the pods may reach what this machine can't
            return Answer([warning(_NAME, f"{found.value} from here", found.advice)])
        return Answer([found], mlflow_server.wants_login(uri))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    listens = [one.port for one in service.spec.ports or ()]
    if port not in listens and service.spec.cluster_ip != "None":
        return Answer(
            [
                error(
                    _NAME,
                    f"{shown(uri)}: the service listens on {names(map(str, listens))}",
                    "correct the port",
                )
            ]
        )
    return _ask(
        cluster,
        service,
        f"{parts.scheme}:" if parts.scheme == "https" else "",
        str(port),
        parts.path.strip("/"),
        shown(uri),
    )


def _service(cluster: Cluster, host: str) -> tuple[Any | None, str]:
    """The service of a host name, and its name where the host can be nothing else."""
    plain = host.removesuffix(".").removesuffix(".cluster.local")
    certain = plain.endswith(".svc") or "." not in plain
    name, *rest = plain.removesuffix(".svc").split(".")
    if len(rest) > 1:
        return None, ""
    namespace = rest[0] if rest else cluster.namespace
    if (
        not certain
        and cluster.ask("get", "namespaces", cluster.core.read_namespace, namespace) is None
    ):
        return None, ""  # mlflow.example is the same form as NAME.NAMESPACE
    found = cluster.ask("get", "services", cluster.core.read_namespaced_service, name, namespace)
    return found, f"{name} in namespace {namespace}"


def _ask(
    cluster: Cluster, service: Any, scheme: str, port: str, prefix: str, address: str
) -> Answer:
    name, namespace = service.metadata.name, service.metadata.namespace
    slices: Any = cluster.ask(
        "list",
        "endpointslices.discovery.k8s.io",
        cluster.discovery.list_namespaced_endpoint_slice,
        namespace,
        label_selector=f"kubernetes.io/service-name={name}",
    )
    ready = [
        endpoint
        for one in slices.items
        for endpoint in one.endpoints or ()
        # None: not said, which is to be taken for ready
        if endpoint.conditions is None or endpoint.conditions.ready is not False
    ]
    if not ready:
        return Answer(
            [
                error(
                    _NAME,
                    f"{address}: no pod of the service {name} is ready",
                    f"kubectl -n {namespace} get pods",
                )
            ]
        )

    def get(path: str) -> tuple[int, str]:
        below = f"{prefix}/{path}" if prefix else path
        return cluster.by_way_of_service(f"{scheme}{name}", namespace, port, below)

    status, body = get("health")
    if status == 0:
        return Answer(
            [
                warning(
                    _NAME,
                    f"{address}: {len(ready)} pods ready; not asked ({body[:200]})",
                    "the verb get on services/proxy lets it be asked",
                )
            ]
        )
    if status != 200 or body.strip() != "OK":
        return Answer(
            [error(_NAME, f"{address} answers {status} ({body[:200]})", "look at MLflow's log")]
        )
    status, _ = get(mlflow_server.WITH_A_LOGIN)
    wants = {200: False, 401: True}.get(status)
    what = {None: "", False: ", without a login", True: ", with a login"}[wants]
    return Answer([ok(_NAME, f"{address} answers{what}")], wants)
