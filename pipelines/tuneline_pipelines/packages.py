"""A compiled pipeline, as a file or as the server gives it back: its parameters and its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tuneline import __version__
from tuneline.artifacts import digest_of
from tuneline.errors import UsageError, did_you_mean
from tuneline_pipelines import lint

_DIGITS: Final = 12


@dataclass(frozen=True)
class Step:
    """A task that runs in pods of its own."""

    name: str
    template: str
    """Argo's name for what its pods are made from; a part of a pod's name."""
    attempts: int
    """Pods that it may have one after the other; 0: one, and Argo counts none."""


@dataclass(frozen=True)
class Package:
    """A pipeline spec, and the platform spec that may go with it."""

    spec: Mapping[str, Any]
    platform: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the pipeline."""
        return self.spec["pipelineInfo"]["name"]

    @property
    def description(self) -> str:
        """Of the pipeline."""
        return self.spec["pipelineInfo"].get("description", "")

    @cached_property
    def version_name(self) -> str:
        """tuneline's version and the digest of the content: equal packages have equal names."""
        digest = digest_of([self.spec, self.platform]).removeprefix("sha256:")
        return f"{__version__}-{digest[:_DIGITS]}"

    @property
    def inputs(self) -> Mapping[str, Mapping[str, Any]]:
        """The parameters of a run, by name."""
        return self.spec["root"].get("inputDefinitions", {}).get("parameters", {})

    @property
    def moving_images(self) -> list[str]:
        """Images without a digest: what runs can change while the package stays the same."""
        executors = self.spec.get("deploymentSpec", {}).get("executors", {}).values()
        images = (executor.get("container", {}).get("image", "") for executor in executors)
        return sorted({image for image in images if image and "@sha256:" not in image})

    @property
    def body(self) -> dict[str, Any]:
        """As a run takes it that is of no published version."""
        if not self.platform:
            return dict(self.spec)
        return {"pipeline_spec": dict(self.spec), "platform_spec": dict(self.platform)}

    @cached_property
    def steps(self) -> dict[str, Step]:
        """Those that run in pods, by name."""
        executors = (
            self.platform.get("platforms", {})
            .get("kubernetes", {})
            .get("deploymentSpec", {})
            .get("executors", {})
        )
        found = {}
        for name, task in self._tasks():
            component = self.spec["components"].get(task["componentRef"]["name"], {})
            label = component.get("executorLabel")
            if label:
                metadata = executors.get(label, {}).get("podMetadata")
                retry = task.get("retryPolicy")
                attempts = 0 if retry is None else int(retry.get("maxRetryCount", 0)) + 1
                found[name] = Step(name, _template(attempts > 0, metadata), attempts)
        return found

    def _tasks(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for component in (self.spec["root"], *self.spec.get("components", {}).values()):
            yield from component.get("dag", {}).get("tasks", {}).items()

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse what the server would refuse, or take and do without.

        Raises:
            UsageError: an argument that the pipeline has not, one that it offers no such value for,
                or one missing that it needs.
        """
        for name, value in arguments.items():
            if name not in self.inputs:
                raise UsageError(
                    f"{self.name} has no parameter {name}; it has {', '.join(self.inputs)}."
                    f"{did_you_mean(name, self.inputs)} If another release of tuneline made it, "
                    "run `tuneline publish`"
                )
            offered = self.inputs[name].get("literals")
            if offered and value not in offered:
                raise UsageError(
                    f"{name}: '{value}' is not offered by {self.name}, which takes "
                    f"{', '.join(map(str, offered))}."
                    + (did_you_mean(value, offered) if isinstance(value, str) else "")
                )
        for name, definition in self.inputs.items():
            needed = "defaultValue" not in definition and not definition.get("isOptional")
            if needed and name not in arguments:
                raise UsageError(
                    f"{self.name} needs the parameter {name}, which nothing here sets: if another "
                    "release of tuneline made the package, run `tuneline publish`"
                )


def _template(retried: bool, metadata: Mapping[str, Any] | None) -> str:
    # backend/src/v2/compiler/argocompiler/container.go of KFP 2.17, addContainerExecutorTemplate
    name = "system-container-impl"
    if retried:
        name = f"retry-{name}"
    if metadata is not None:
        counts = (len(metadata.get(key, {})) for key in ("annotations", "labels"))
        name = f"metadata-{'-'.join(map(str, counts))}-{name}"
    return name


def read(path: Path) -> Package:
    """Read a package file.

    Raises:
        UsageError: it is no package.
    """
    package = of(lint.read(path))
    if package is None:
        raise UsageError(f"{path} names no pipeline: `tuneline compile` writes packages")
    return package


def of(documents: Any) -> Package | None:
    """The package in a file's documents, or in what the server gives for a version; None if it is
    none.
    """
    if isinstance(documents, Mapping):
        documents = (
            [documents["pipeline_spec"], documents.get("platform_spec")]
            if "pipeline_spec" in documents
            else [documents]
        )
    spec, *platforms = documents or [None]
    if not isinstance(spec, Mapping) or not isinstance(spec.get("root"), Mapping):
        return None
    info = spec.get("pipelineInfo")
    if not isinstance(info, Mapping) or not info.get("name"):
        return None
    platform: dict[str, Any] = {}
    for document in platforms:
        platform.update(document or {})
    return Package(spec, platform)


def read_folder(folder: Path) -> list[Package]:
    """Every package of a folder, by name.

    Raises:
        UsageError: there is none, two of one name, or a YAML file that is none.
    """
    files = sorted(p for p in folder.glob("*.yaml") if not p.name.endswith(".partial.yaml"))
    if not files:
        raise UsageError(
            f"{folder} has no packages: write them with `tuneline compile --out {folder}`"
        )
    found: dict[str, Package] = {}
    for file in files:
        package = read(file)
        if package.name in found:
            raise UsageError(f"{folder} has the pipeline {package.name} twice: keep one of them")
        found[package.name] = package
    return list(found.values())


def compile_all(pools: Path | None = None, *, release: bool = False) -> dict[str, Package]:
    """Every pipeline of this tuneline, by name.

    Args:
        pools: file with the node pools that the run forms offer.
        release: whether images must be named by digest.
    """
    import tempfile

    from tuneline import pools as node_pools
    from tuneline_pipelines.compile import compile_pipelines

    with tempfile.TemporaryDirectory() as folder:
        written = compile_pipelines(Path(folder), node_pools.read(pools), release=release)
        return {package.name: package for package in map(read, written)}
