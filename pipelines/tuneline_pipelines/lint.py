"""Rules for compiled KFP v2 pipelines whose breach the compiler and the API server let pass.

The driver finds out when a step is about to start, or nobody does: a GPU request that resolves to
nothing, a default of null that fails in a loop, a registration that was taken from the cache. The
rules hold for any KFP v2 package, not for those of tuneline only. They were drawn from the source
of KFP 2.17's driver and SDK.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneline.errors import UsageError

RULES: Final[dict[str, str]] = {
    "runs-something": "a package has tasks, and what each of them runs",
    "input-exists": "an input is taken from where there is one",
    "resource-is-passed": "a parameter that a resource refers to is an input of its task",
    "resource-is-string": "a parameter of a resource is a STRING",
    "null-stays-out": "no optional input without a default enters a loop, condition or exit "
    "handler",
    "container-inputs": "a container component gets every input that its command names",
    "gpu-toleration": "a step with an accelerator tolerates the taint of such nodes",
    "gpu-selector": "a step with an accelerator says which nodes",
    "gpu-shm": "a step with an accelerator has a /dev/shm of its own",
    "gpu-retry": "a step with an accelerator is tried again, however late it fails",
    "effects-uncached": "a step that registers, promotes or notifies is not cached",
    "image-pinned": "an image has a tag that stays, in a release a digest",
    "secret-named": "a secret or config map has a name",
    "no-secret": "no secret stands in the package",
    "plugin-variable": "no step sets a variable that KFP's MLflow plugin sets",
    "non-root": "a step runs as a user that is not root, whatever its image says",
    "importer-on-top": "an importer is not in a condition or loop",
    "workspace-mode": "a workspace says how it is mounted",
}
"""Rule -> what has to hold."""
_RESOURCE_KEYS: Final = (
    "resourceCpuLimit",
    "resourceCpuRequest",
    "resourceMemoryLimit",
    "resourceMemoryRequest",
)
_PLACEHOLDER: Final = re.compile(r"\{\{\$\.inputs\.parameters\[['\"](.+?)['\"]\]\}\}")
_CONDITION: Final = re.compile(r"inputs\.parameter_values\[['\"](.+?)['\"]\]")
_EFFECT: Final = re.compile(r"(^|[-_])(register|promote|notify|publish|deploy)", re.IGNORECASE)
_SECRET: Final = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|ACCESS_KEY|API_KEY|CREDENTIAL", re.I)
_LEAST_BACKOFF_SECONDS: Final = 24 * 3600
_DEFAULT_BACKOFF_SECONDS: Final = 3600
_ROOT: Final = "root"
# backend/src/v2/common/plugins/mlflow/handler.go of KFP 2.17, RetrieveUserContainerEnvVars
_PLUGIN_VALUES: Final = (
    "KFP_MLFLOW_CONFIG",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_WORKSPACE",
)
_PLUGIN_SECRETS: Final = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
)


@dataclass(frozen=True)
class Finding:
    """A breach of a rule."""

    rule: str
    where: str
    """Path of tasks from the root, or the executor."""
    fault: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.fault}: {self.fix} [{self.rule}]"


def read(path: Path) -> list[Any]:
    """The documents of a package.

    Raises:
        UsageError: no such file, or it is no KFP v2 package.
    """
    import yaml

    try:
        documents = [found for found in yaml.safe_load_all(path.read_text("utf-8")) if found]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{path} can't be read ({reason}): name a compiled package") from error
    if _spec_of(documents) is None:
        raise UsageError(
            f"{path} is no compiled KFP v2 pipeline, which has `root`, `components` and "
            "`deploymentSpec`: compile it with kfp 2, or `tuneline compile`"
        )
    return documents


def check(documents: Sequence[Any], *, release: bool = False) -> list[Finding]:
    """Every breach in a package.

    Args:
        documents: of the package's YAML: the pipeline spec, and a platform spec if there is one.
        release: whether images must be named by digest.
    """
    package = _Package(documents)
    findings = [] if any(True for _ in package.tasks()) else [_EMPTY]
    findings += [
        finding
        for rule in (
            _runs,
            _inputs,
            _resources,
            _nulls,
            _containers,
            _accelerators,
            _effects,
            _importers,
        )
        for task in package.tasks()
        for finding in rule(package, task)
    ]
    findings += _images(package, release=release)
    findings += _secrets(package)
    findings += _plugin_variables(package)
    findings += _users(package)
    findings += _workspace(package)
    return list(dict.fromkeys(findings))


def _spec_of(documents: Sequence[Any]) -> Mapping[str, Any] | None:
    for document in documents:
        if isinstance(document, Mapping):
            # GitOps: the spec inside of a Kubernetes object
            inner = _map(document.get("spec")).get("pipelineSpec", document)
            if isinstance(inner, Mapping) and {"root", "deploymentSpec"} <= inner.keys():
                return inner
    return None


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class _Task:
    """One task where it stands."""

    name: str
    path: str
    spec: Mapping[str, Any]
    component: Mapping[str, Any]
    """That it runs."""
    siblings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """Of the DAG that it stands in."""
    depth: int
    executor: str
    """Label, empty for a DAG."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What it is given."""
        return _map(_map(self.spec.get("inputs")).get("parameters"))

    @property
    def artifacts(self) -> Mapping[str, Any]:
        """What it is given."""
        return _map(_map(self.spec.get("inputs")).get("artifacts"))


class _Package:
    def __init__(self, documents: Sequence[Any]) -> None:
        self.spec = _map(_spec_of(documents))
        self.components = _map(self.spec.get("components"))
        self.executors = _map(_map(self.spec.get("deploymentSpec")).get("executors"))
        platform: Mapping[str, Any] = {}
        for document in documents:
            inner = _map(_map(document).get("spec")).get("platformSpec", document)
            if "platforms" in _map(inner):
                platform = _map(_map(inner["platforms"]).get("kubernetes"))
        self.platform = platform
        self.platform_executors = _map(_map(platform.get("deploymentSpec")).get("executors"))

    def component(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        return _map(self.components.get(_map(task.get("componentRef")).get("name", "")))

    def tasks(self) -> Iterator[_Task]:
        yield from self._tasks(_map(self.spec.get(_ROOT)), (), frozenset())

    def _tasks(
        self, dag: Mapping[str, Any], path: tuple[str, ...], above: frozenset[str]
    ) -> Iterator[_Task]:
        siblings = _map(_map(dag.get("dag")).get("tasks"))
        for name, spec in siblings.items():
            component = self.component(_map(spec))
            yield _Task(
                name=name,
                path="/".join((*path, name)),
                spec=_map(spec),
                component=component,
                siblings=siblings,
                inputs=_map(dag.get("inputDefinitions")),
                depth=len(path),
                executor=str(component.get("executorLabel", "")),
            )
            reference = str(_map(_map(spec).get("componentRef")).get("name", ""))
            if "dag" in component and reference not in above:
                yield from self._tasks(component, (*path, name), above | {reference})

    def container(self, task: _Task) -> Mapping[str, Any]:
        return _map(_map(self.executors.get(task.executor)).get("container"))

    def kubernetes(self, task: _Task) -> Mapping[str, Any]:
        return _map(self.platform_executors.get(task.executor))

    def fault_of(self, task: _Task, source: Any, kind: str = "parameters") -> str:
        """Why nothing comes from where an input is taken from; empty if something does."""
        source = _map(source)
        own = source.get("componentInputParameter") or source.get("componentInputArtifact")
        if own is not None and own not in _map(task.inputs.get(kind)):
            return f"'{own}' is no input of the group that the task stands in"
        output = source.get("taskOutputParameter") or source.get("taskOutputArtifact")
        if output is not None:
            producer = _map(output).get("producerTask", "")
            key = _map(output).get("outputParameterKey") or _map(output).get("outputArtifactKey")
            if producer not in task.siblings:
                return f"'{producer}' is no task of the group that the task stands in"
            outputs = _map(self.component(task.siblings[producer]).get("outputDefinitions"))
            if key not in _map(outputs.get(kind)):
                return f"'{producer}' has no output '{key}'"
        return ""

    def type_of(self, task: _Task, name: str) -> str:
        """The type of a task's input, empty where it is unknown."""
        source = _map(task.parameters.get(name))
        if (own := source.get("componentInputParameter")) is not None:
            return str(_map(_map(task.inputs.get("parameters")).get(own)).get("parameterType", ""))
        if (output := source.get("taskOutputParameter")) is not None:
            producer = _map(task.siblings.get(_map(output).get("producerTask", "")))
            outputs = _map(
                _map(self.component(producer).get("outputDefinitions")).get("parameters")
            )
            key = str(_map(output).get("outputParameterKey", ""))
            return str(_map(outputs.get(key)).get("parameterType", ""))
        if "runtimeValue" in source:
            return "STRING" if isinstance(source["runtimeValue"].get("constant"), str) else "NUMBER"
        definitions = _map(_map(task.component.get("inputDefinitions")).get("parameters"))
        return str(_map(definitions.get(name)).get("parameterType", ""))


_MADE_AGAIN: Final = "compile it again: this is not what kfp's compiler writes"
_EMPTY: Final = Finding("runs-something", _ROOT, "the pipeline has no task", _MADE_AGAIN)


def _runs(package: _Package, task: _Task) -> Iterator[Finding]:
    """What is not there can't be checked, and must not pass for checked."""
    reference = str(_map(task.spec.get("componentRef")).get("name", ""))
    if not task.component:
        fault = f"it runs component '{reference}', which the package does not have"
    elif "dag" in task.component or _runs_what(package.executors.get(task.executor)):
        return
    else:
        fault = f"executor '{task.executor}' has neither a container nor an importer"
    yield Finding("runs-something", task.path, fault, _MADE_AGAIN)


def _runs_what(executor: Any) -> bool:
    return any(isinstance(inner, Mapping) for inner in _map(executor).values())


_GROUP_FIX: Final = (
    "hand it in with task.register_pipeline_channels([...]), or also as an input of the component"
)


def _inputs(package: _Package, task: _Task) -> Iterator[Finding]:
    sources = [(name, source, "parameters") for name, source in task.parameters.items()]
    sources += [(name, source, "artifacts") for name, source in task.artifacts.items()]
    for name, source, kind in sources:
        if fault := package.fault_of(task, source, kind):
            yield Finding("input-exists", task.path, f"input '{name}': {fault}", _GROUP_FIX)
    for where, source in _references(package.kubernetes(task)):
        if fault := package.fault_of(task, source):
            yield Finding("input-exists", task.path, f"{where}: {fault}", _GROUP_FIX)
    iterator = _map(task.spec.get("parameterIterator"))
    looped = _map(iterator.get("items")).get("inputParameter")
    if looped is not None and looped not in task.parameters:
        yield Finding(
            "input-exists",
            task.path,
            f"the loop goes over '{looped}', which the task is not given",
            "pass the list into the loop",
        )
    condition = str(_map(task.spec.get("triggerPolicy")).get("condition", ""))
    for name in _CONDITION.findall(condition):
        if name not in task.parameters:
            yield Finding(
                "input-exists",
                task.path,
                f"the condition reads '{name}', which the task is not given",
                "compare an output of a task before it, or a parameter of the pipeline",
            )


def _references(value: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every place in a platform's executor that takes a value from somewhere."""
    if isinstance(value, Mapping):
        if "componentInputParameter" in value or "taskOutputParameter" in value:
            yield where, value
            return
        for key, inner in value.items():
            yield from _references(inner, where or key)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _references(inner, where)


def _resources(package: _Package, task: _Task) -> Iterator[Finding]:
    resources = _map(package.container(task).get("resources"))
    accelerator = _map(resources.get("accelerator"))
    texts = {key: resources.get(key, "") for key in _RESOURCE_KEYS}
    texts |= {
        f"accelerator.{key}": accelerator.get(key, "") for key in ("resourceType", "resourceCount")
    }
    declared = _map(_map(task.component.get("inputDefinitions")).get("parameters"))
    for where, text in texts.items():
        for name in _PLACEHOLDER.findall(str(text)):
            if name not in task.parameters and "defaultValue" not in _map(declared.get(name)):
                yield Finding(
                    "resource-is-passed",
                    task.path,
                    f"{where} refers to '{name}', which the task is not "
                    "given, so that the request is dropped",
                    _GROUP_FIX,
                )
            elif (found := package.type_of(task, name)) not in ("STRING", ""):
                yield Finding(
                    "resource-is-string",
                    task.path,
                    f"{where} refers to '{name}' of type {found}, of which "
                    "the driver makes nothing, so that the request is dropped",
                    "annotate the parameter as str",
                )


def _nulls(package: _Package, task: _Task) -> Iterator[Finding]:
    del package
    if "dag" not in task.component:
        return
    definitions = _map(task.inputs.get("parameters"))
    for name, source in task.parameters.items():
        own = str(_map(source).get("componentInputParameter", ""))
        definition = _map(definitions.get(own))
        if definition.get("isOptional") and definition.get("defaultValue") is None:
            yield Finding(
                "null-stays-out",
                task.path,
                f"'{own}' is optional without a default, and enters the group "
                f"as '{name}', where its null fails the driver",
                "give it a real default, as an empty text",
            )


def _containers(package: _Package, task: _Task) -> Iterator[Finding]:
    container = package.container(task)
    words = [*(container.get("command") or ()), *(container.get("args") or ())]
    if "--executor_input" in words:  # a Python component, which reads its inputs itself
        return
    for name in dict.fromkeys(_PLACEHOLDER.findall(" ".join(map(str, words)))):
        if name not in task.parameters:
            yield Finding(
                "container-inputs",
                task.path,
                f"the command names '{name}', which the task is not given, "
                "and which the driver can't fill in",
                f"pass {name} explicitly",
            )


def _accelerators(package: _Package, task: _Task) -> Iterator[Finding]:
    accelerator = _map(_map(package.container(task).get("resources")).get("accelerator"))
    if not accelerator:
        return
    placed = package.kubernetes(task)
    if not placed.get("tolerations"):
        yield Finding(
            "gpu-toleration",
            task.path,
            "no toleration: nodes with accelerators are tainted as a rule, "
            "and the step waits for ever",
            "kubernetes.add_toleration(task, ...)",
        )
    if not (placed.get("nodeSelector") or placed.get("nodeAffinity")):
        yield Finding(
            "gpu-selector",
            task.path,
            "no node selector or affinity: any node with an accelerator of "
            "whatever kind may take the step",
            "kubernetes.add_node_selector(task, ...)",
        )
    mounts = [_map(mount).get("mountPath") for mount in placed.get("emptyDirMounts") or ()]
    if "/dev/shm" not in mounts:
        yield Finding(
            "gpu-shm",
            task.path,
            "/dev/shm has the container runtime's 64 MB, in which data loader and NCCL fail",
            'kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", '
            'size_limit="16Gi")',
        )
    retry = _map(task.spec.get("retryPolicy"))
    longest = _seconds(retry.get("backoffMaxDuration"))
    if not int(retry.get("maxRetryCount") or 0):
        yield Finding(
            "gpu-retry",
            task.path,
            "no retry: a lost node loses the run",
            'task.set_retry(3, backoff_max_duration="604800s")',
        )
    elif longest < _LEAST_BACKOFF_SECONDS:
        yield Finding(
            "gpu-retry",
            task.path,
            f"retries end {longest} s after the first attempt began, so that a step "
            "that fails later is never tried again",
            'task.set_retry(3, backoff_max_duration="604800s")',
        )


def _seconds(duration: Any) -> int:
    found = re.fullmatch(r"(\d+)(?:\.\d+)?s", str(duration or ""))
    return int(found[1]) if found else _DEFAULT_BACKOFF_SECONDS


def _effects(package: _Package, task: _Task) -> Iterator[Finding]:
    del package
    cached = _map(task.spec.get("cachingOptions")).get("enableCache")
    reference = str(_map(task.spec.get("componentRef")).get("name", "")).removeprefix("comp-")
    if cached and task.executor and (_EFFECT.search(task.name) or _EFFECT.search(reference)):
        yield Finding(
            "effects-uncached",
            task.path,
            "the step is cached, so that with equal inputs it does nothing and is green",
            "task.set_caching_options(False)",
        )


def _importers(package: _Package, task: _Task) -> Iterator[Finding]:
    if task.depth and "importer" in _map(package.executors.get(task.executor)):
        yield Finding(
            "importer-on-top",
            task.path,
            "an importer in a condition or loop is refused by the API server or fails",
            "move it out, or read the URI in the step that needs it",
        )


def _images(package: _Package, *, release: bool) -> Iterator[Finding]:
    for label, executor in package.executors.items():
        image = str(_map(_map(executor).get("container")).get("image", ""))
        if not image or image.startswith("argostub/") or "{{$" in image:
            continue
        name, _, digest = image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if digest.startswith("sha256:"):
            continue
        if release:
            yield Finding(
                "image-pinned",
                label,
                f"image {image} has no digest: what runs can change under the same "
                "name, and KFP's cache would not see it",
                "name it as IMAGE@sha256:...",
            )
        elif tag in ("", "latest"):
            yield Finding(
                "image-pinned",
                label,
                f"image {image} means another one tomorrow",
                "name a version's tag, or a digest",
            )


def _secrets(package: _Package) -> Iterator[Finding]:
    for label, placed in package.platform_executors.items():
        for key, name in (
            ("secretAsEnv", "secretName"),
            ("secretAsVolume", "secretName"),
            ("configMapAsEnv", "configMapName"),
            ("configMapAsVolume", "configMapName"),
        ):
            for entry in _map(placed).get(key) or ():
                parameter = _map(_map(entry).get(f"{name}Parameter"))
                constant = _map(parameter.get("runtimeValue")).get("constant")
                given = any(
                    k in parameter for k in ("componentInputParameter", "taskOutputParameter")
                )
                if not (given or constant or _map(entry).get(name)):
                    yield Finding(
                        "secret-named",
                        label,
                        f"{key} has an empty name, on which the driver fails",
                        "give a real name, and optional=True where it may be absent",
                    )
    for label, executor in package.executors.items():
        for variable in _map(_map(executor).get("container")).get("env") or ():
            name, value = str(_map(variable).get("name", "")), _map(variable).get("value")
            if value and _SECRET.search(name) and "{{$" not in str(value):
                yield Finding(
                    "no-secret",
                    label,
                    f"the value of {name} stands in the package, for everyone to read",
                    "kubernetes.use_secret_as_env(task, ...)",
                )


def _plugin_variables(package: _Package) -> Iterator[Finding]:
    """Argo merges entries of one name: both a value and a source of it are refused by Kubernetes.

    Two references to secrets merge cleanly, and the later one wins.
    """
    for label, executor in package.executors.items():
        placed = _map(package.platform_executors.get(label))
        named = [
            (str(_map(entry).get("name", "")), "the container")
            for entry in _map(_map(executor).get("container")).get("env") or ()
        ]
        for key in ("secretAsEnv", "configMapAsEnv"):
            for entry in placed.get(key) or ():
                named += [
                    (str(_map(pair).get("envVar", "")), key)
                    for pair in _map(entry).get("keyToEnv") or ()
                ]
        named += [
            (str(_map(entry).get("name", "")), "fieldPathAsEnv")
            for entry in placed.get("fieldPathAsEnv") or ()
        ]
        for name, source in named:
            secret = name in _PLUGIN_SECRETS and source != "secretAsEnv"
            if secret or name in _PLUGIN_VALUES:
                yield Finding(
                    "plugin-variable",
                    label,
                    f"{source} sets {name}, as KFP's MLflow plugin does: where it is on, the two "
                    "are merged into one entry, and Kubernetes refuses the pod",
                    "set a variable of your own name, and read it where this one is not set",
                )


def _users(package: _Package) -> Iterator[Finding]:
    for label, executor in package.executors.items():
        context = _map(_map(package.platform_executors.get(label)).get("securityContext"))
        if "container" in _map(executor) and not (
            context.get("runAsNonRoot") and int(context.get("runAsUser") or 0)
        ):
            yield Finding(
                "non-root",
                label,
                "nothing keeps the step from running as root",
                "kubernetes.set_security_context(task, run_as_user=10001, run_as_non_root=True)",
            )


def _workspace(package: _Package) -> Iterator[Finding]:
    config = _map(package.platform.get("pipelineConfig"))
    if "workspace" in config and "accessModes" not in str(config["workspace"]):
        yield Finding(
            "workspace-mode",
            "pipelineConfig",
            "the workspace has no access modes, on which its volume fails",
            "KubernetesWorkspaceConfig(pvcSpecPatch={'accessModes': ['ReadWriteOnce']})",
        )
