"""KFP's MLflow plugin: whether the API server's settings have it hand MLflow's address and login to
the steps. A secret of the plugin's name alone does nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from tuneline_pipelines.doctor.cluster import Cluster

SECRET: Final = "kfp-mlflow-credentials"
"""The name is KFP's; it is read in the namespace of the pods."""
_DEPLOYMENT: Final = "ml-pipeline"
_SETTINGS: Final = PurePosixPath("/config/config.json")
_VARIABLES: Final = {
    "basic-auth": {
        "usernameKey": "MLFLOW_TRACKING_USERNAME",
        "passwordKey": "MLFLOW_TRACKING_PASSWORD",
    },
    "bearer": {"tokenKey": "MLFLOW_TRACKING_TOKEN"},
}
"""Kind of login -> setting that names a key of the secret, and the variable that it becomes."""


@dataclass(frozen=True)
class Plugin:
    """What steps get from it."""

    endpoint: str
    keys: dict[str, str] = field(default_factory=dict)
    """Of the secret -> the variables that they become; empty: MLflow has no login."""


def find(cluster: Cluster, namespaces: Iterable[str]) -> Plugin | None:
    """The plugin, if it is on and hands anything to the steps.

    Args:
        cluster: that KFP is in.
        namespaces: where its API server may be.

    Raises:
        Denied: this login may not look at the deployment or at its settings.
    """
    for namespace in dict.fromkeys(namespaces):
        server = cluster.ask(
            "get",
            "deployments.apps",
            cluster.apps.read_namespaced_deployment,
            _DEPLOYMENT,
            namespace,
        )
        if server is not None:
            return _plugin(_settings(cluster, server, namespace))
    return None


def _settings(cluster: Cluster, server: Any, namespace: str) -> Mapping[str, Any]:
    """Those that are mounted over the image's own, which have no plugin."""
    pod = server.spec.template.spec
    sources = {volume.name: volume.config_map for volume in pod.volumes or ()}
    for container in pod.containers:
        for mount in container.volume_mounts or ():
            path, source = PurePosixPath(mount.mount_path), sources.get(mount.name)
            if source is None or path not in (_SETTINGS, _SETTINGS.parent):
                continue
            found = cluster.ask(
                "get",
                "configmaps",
                cluster.core.read_namespaced_config_map,
                source.name,
                namespace,
            )
            key = (mount.sub_path if path == _SETTINGS else "") or _SETTINGS.name
            try:
                settings = json.loads(((found.data if found else None) or {}).get(key, ""))
            except ValueError:
                return {}
            return settings if isinstance(settings, dict) else {}
    return {}


def _plugin(settings: Mapping[str, Any]) -> Plugin | None:
    mlflow = _mapping(_mapping(settings.get("plugins")).get("mlflow"))
    own = _mapping(mlflow.get("settings"))
    if own.get("injectUserEnvVars") is not True:
        return None
    reference = _mapping(own.get("credentialSecretRef"))
    variables = _VARIABLES.get(str(own.get("authType")), {})
    keys = {
        str(reference[name]): variable for name, variable in variables.items() if name in reference
    }
    return Plugin(str(mlflow.get("endpoint", "")), keys)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
