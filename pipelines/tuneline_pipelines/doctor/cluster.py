"""A Kubernetes API, asked with short patience and one request at a time.

An object that is not there is None; a question that this login may not ask is `Denied`, which
becomes a warning; what makes every further question useless is `Unusable`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tuneline.errors import ClusterError, UsageError, did_you_mean
from tuneline_pipelines.connection import NAMESPACE_VARIABLE

_TIMEOUT_SECONDS: Final = (5.0, 20.0)
"""To connect, and between two bytes of an answer."""
_PAGE_SIZE: Final = 500
_POD_NAMESPACE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_KFP_NAMESPACE: Final = "kubeflow"


class Denied(ClusterError):
    """This login may not look.

    Attributes:
        advice: the command that shows it.
    """

    def __init__(self, verb: str, resource: str, namespace: str) -> None:
        where = f" in namespace {namespace}" if namespace else ""
        super().__init__(f"not looked at: this login may not {verb} {resource}{where}")
        option = f" -n {namespace}" if namespace else ""
        self.advice = (
            f"ask for the verb {verb} on it (kubectl auth can-i {verb} {resource}{option})"
        )


class Unusable(ClusterError):
    """The cluster can't be asked anything."""


class Cluster:
    """One cluster, as one user.

    Args:
        context: of the kubeconfig; None: the current one, or the cluster that this pod is in.
        namespace: of the runs' pods; None: KFP_NAMESPACE, this pod's own, or the context's.

    Raises:
        UsageError: no cluster is configured, or the context is unknown.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        import kubernetes
        import urllib3
        from kubernetes.config import ConfigException

        settings: Any = kubernetes.client.Configuration()
        own, file = "", os.environ.get("KUBECONFIG") or None
        try:
            if _is_pod() and context is None and file is None:
                kubernetes.config.load_incluster_config(settings)
                own = _POD_NAMESPACE.read_text(encoding="utf-8").strip()
            else:
                known: Any
                active: Any
                known, active = kubernetes.config.list_kube_config_contexts(file)
                if context is not None and context not in (names := [c["name"] for c in known]):
                    raise UsageError(
                        f"context '{context}' is unknown; the kubeconfig has {', '.join(names)}."
                        f"{did_you_mean(context, names)}"
                    )
                chosen = next((c for c in known if c["name"] == context), active)
                kubernetes.config.load_kube_config(
                    file, context=context, client_configuration=settings
                )
                own = chosen["context"].get("namespace", "")
        except (ConfigException, OSError) as error:
            raise UsageError(
                f"no Kubernetes cluster is configured ({' '.join(str(error).split())}): set "
                "KUBECONFIG or name a --context"
            ) from error
        # of a thing that is not there, patience makes nothing; and a password may not be sent on
        settings.retries = urllib3.Retry(0, redirect=False)
        self.host: str = settings.host
        own = "" if own == "default" else own
        self.namespace = namespace or os.environ.get(NAMESPACE_VARIABLE) or own or _KFP_NAMESPACE
        self._client: Any = kubernetes.client.ApiClient(settings)
        self.core = kubernetes.client.CoreV1Api(self._client)
        self.apps = kubernetes.client.AppsV1Api(self._client)
        self.storage = kubernetes.client.StorageV1Api(self._client)
        self.discovery = kubernetes.client.DiscoveryV1Api(self._client)
        self.custom = kubernetes.client.CustomObjectsApi(self._client)
        self.version_api = kubernetes.client.VersionApi(self._client)

    def ask(
        self,
        verb: str,
        resource: str,
        function: Callable[..., Any],
        *arguments: Any,
        **keywords: Any,
    ) -> Any | None:
        """The answer of an operation; None: there is no such object.

        Args:
            verb: as RBAC calls it.
            resource: as RBAC calls it, with its group.
            function: of the generated client.
            *arguments: of the function; the last one is the namespace where it has one.
            **keywords: of the function.

        Raises:
            Denied: this login may not ask that.
            Unusable: no answer, or the login is not accepted at all.
            ClusterError: an answer that can't be read.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            return function(*arguments, _request_timeout=_TIMEOUT_SECONDS, **keywords)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status == 403:
                named = "namespaced" in function.__name__
                namespace = keywords.get("namespace") or (arguments[-1] if named else "")
                raise Denied(verb, resource, namespace) from None
            if error.status == 401:
                raise Unusable(
                    f"{self.host} does not know who asks (401): log in again, or name another "
                    "--context"
                ) from None
            raise Unusable(f"{self.host} answers {error.status} ({said(error.body)})") from None
        except ValueError as error:  # the generated models insist on fields that servers leave out
            raise ClusterError(f"the answer to {verb} {resource} can't be read: {error}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unusable(
                f"{self.host} can't be reached ({str(reason).rpartition(': ')[2] or reason}): "
                "check the kubeconfig and the network"
            ) from error

    def raw(self, verb: str, resource: str, path: str) -> Any | None:
        """The JSON at a path of the API; None: there is none.

        Args:
            verb: as RBAC calls it.
            resource: as RBAC calls it.
            path: with its leading slash.

        Raises:
            Denied: this login may not ask that.
            Unusable: no answer, or the login is not accepted at all.
        """

        def get(**keywords: Any) -> Any:
            return self._client.call_api(
                path,
                "GET",
                auth_settings=["BearerToken"],
                response_type="object",
                _return_http_data_only=True,
                **keywords,
            )

        return self.ask(verb, resource, get)

    def by_way_of_service(self, name: str, namespace: str, port: str, path: str) -> tuple[int, str]:
        """GET a path of a service through the API server, without a login of that service.

        Returns:
            The status and the body. What the API server itself refuses or can't forward is 0, with
            its reason.
        """
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            answer = self._client.call_api(
                f"/api/v1/namespaces/{namespace}/services/{name}:{port}/proxy/{path}",
                "GET",
                auth_settings=["BearerToken"],
                response_type="str",
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT_SECONDS,
            )
        except ApiException as error:
            own = _status_of(error.body)
            if own is not None:
                return 0, str(own.get("message", error.reason))
            return int(error.status or 0), said(error.body)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return 0, str(error)
        return 200, str(answer)

    @cached_property
    def nodes(self) -> list[Any]:
        """All of the cluster.

        Raises:
            Denied: this login may not list them.
        """
        found: list[Any] = []
        following = None
        while True:
            page: Any = self.ask(
                "list", "nodes", self.core.list_node, limit=_PAGE_SIZE, _continue=following
            )
            found += page.items
            following = page.metadata._continue
            if not following:
                return found


def names(items: Iterable[str], most: int = 8) -> str:
    """Some names as text, the first ones if there are many."""
    known = sorted(items)
    shown = known[:most] + [f"{len(known) - most} more"] * (len(known) > most)
    return ", ".join(shown) or "none"


def shown(uri: str) -> str:
    """An address without the login that may be in it."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def said(body: Any) -> str:
    """What a server says is wrong, in one line."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    status = _status_of(text)
    return " ".join(str(status.get("message") if status else text).split())[:300]


def _status_of(body: Any) -> dict[str, Any] | None:
    """Kubernetes' own kind of error; None for an error of what it forwards to."""
    try:
        answer = json.loads(body or "")
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.get("kind") == "Status" else None


def _is_pod() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and _POD_NAMESPACE.is_file()
