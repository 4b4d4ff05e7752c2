"""What compiled packages refer to in the cluster: read out of them, so that what is checked is what
will run, whatever release or setting they were compiled with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tuneline import pools
from tuneline_pipelines.packages import Package


@dataclass(frozen=True)
class Needs:
    """Names of objects in the namespace of the pods."""

    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    """Config map -> its keys and the variables that they become."""
    pools_files: dict[str, str] = field(default_factory=dict)
    """Config map with the node pools -> the key that is read."""
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Secret -> its keys and the variables that they become."""
    claims: dict[str, str] = field(default_factory=dict)
    """Volume claim -> where it is mounted."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of pods."""
    variables: dict[str, str] = field(default_factory=dict)
    """Set in the packages themselves."""
    images: dict[str, str] = field(default_factory=dict)
    """Image -> a pipeline that runs in it."""
    pools: list[str] = field(default_factory=list)
    """That the run forms offer."""


def of(packages: Iterable[Package]) -> Needs:
    """All that packages refer to by name; what a parameter of the run names is not known yet."""
    needs = Needs()
    for package in packages:
        for executor in package.spec.get("deploymentSpec", {}).get("executors", {}).values():
            container = executor.get("container", {})
            if image := container.get("image"):
                needs.images.setdefault(image, package.name)
            for entry in container.get("env", ()):
                needs.variables[entry["name"]] = entry["value"]
        platform = package.platform.get("platforms", {}).get("kubernetes", {})
        for executor in platform.get("deploymentSpec", {}).get("executors", {}).values():
            _add(needs, executor)
        offered = package.inputs.get("gpu_pool", {}).get("literals", ())
        needs.pools.extend(name for name in offered if name not in needs.pools)
    return needs


def _add(needs: Needs, executor: Mapping[str, Any]) -> None:
    for entry in executor.get("configMapAsEnv", ()):
        keys = {one["configMapKey"]: one["envVar"] for one in entry["keyToEnv"]}
        needs.config_maps.setdefault(_name(entry, "configMapName"), {}).update(keys)
    for entry in executor.get("secretAsEnv", ()):
        keys = {one["secretKey"]: one["envVar"] for one in entry["keyToEnv"]}
        needs.secrets.setdefault(_name(entry, "secretName"), {}).update(keys)
    read = PurePosixPath(needs.variables.get(pools.VARIABLE, ""))
    for entry in executor.get("configMapAsVolume", ()):
        if PurePosixPath(entry["mountPath"]) == read.parent:
            needs.pools_files[_name(entry, "configMapName")] = read.name
    for entry in executor.get("pvcMount", ()):
        needs.claims[_name(entry, "constant", "pvcNameParameter")] = entry["mountPath"]
    needs.labels.update(executor.get("podMetadata", {}).get("labels", {}))
    for names in (needs.config_maps, needs.secrets, needs.pools_files, needs.claims):
        names.pop("", None)


def _name(entry: Mapping[str, Any], key: str, parameter: str = "") -> str:
    given = entry.get(parameter or f"{key}Parameter", {})
    return given.get("runtimeValue", {}).get("constant", "") or entry.get(key, "")
