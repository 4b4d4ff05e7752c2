"""A KFP to test the client against: the tests' own server, or a real one with `--kfp-host`."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
_VARIABLES = (
    "KFP_HOST", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_COOKIE", "KFP_CA_CERT",
)  # fmt: skip


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kfp_api() -> ModuleType:
    """The module with the tests' own server."""
    return _load(ROOT / "tests/fixtures/kfp_api.py")


@pytest.fixture(scope="session")
def load_fixture() -> Callable[[str], ModuleType]:
    """Loads a module of `tests/fixtures` by its name."""
    return lambda name: _load(ROOT / f"tests/fixtures/{name}.py")


@dataclass
class Endpoint:
    """Where the client's tests go."""

    host: str
    namespace: str
    prefix: str
    """What the names of everything that a test makes begin with."""
    api: Any
    """The tests' own server; None for a real one."""

    def connect(self) -> Any:
        """A connection of the product."""
        from tuneline_pipelines.connection import Connection

        return Connection(self.host, self.namespace or None)

    def submit(self, path: Path, *, word: str) -> tuple[Any, Any]:
        """Run a package of `write_package` with a word; returns the package and the run."""
        from tuneline_pipelines import client, packages

        package = packages.read(path)
        submission = client.Submission(
            f"{self.prefix} {word}", package, {"word": word}, self.prefix
        )
        return package, client.submit(self.connect(), submission)[0]

    def go(
        self,
        run_id: str,
        package: Any,
        states: list[str],
        *,
        step: str = "say",
        log: str = "",
        attempt: int = 0,
    ) -> None:
        """Let the tests' own server run it; a real one does that by itself.

        Args:
            run_id: of the run.
            package: that it runs.
            states: of the run and of one step, as it is read again and again.
            step: the step.
            log: of the step's pod.
            attempt: of the step.
        """
        if self.api is None:
            return
        fixture = sys.modules["kfp_api"]
        workflow = f"{package.name}-x7k2p"
        self.api.courses[run_id] = fixture.Course(
            [(state, list(fixture.nodes(workflow, {step: state}))) for state in states]
        )
        if log:
            # Argo's own rule, from the whole path
            node = fixture.fnv_1a(f"{workflow}.root.{step}.executor({attempt})")
            self.api.logs[f"{workflow}-retry-system-container-impl-{node}"] = log


@pytest.fixture
def endpoint(
    request: pytest.FixtureRequest, kfp_api: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Endpoint]:
    """KFP, and KFP_HOST that names it."""
    host = request.config.getoption("--kfp-host")
    prefix = f"tuneline-test-{secrets.token_hex(4)}"
    if host:
        found = Endpoint(host, request.config.getoption("--namespace") or "", prefix, None)
        monkeypatch.setenv("KFP_HOST", host)
        if found.namespace:
            monkeypatch.setenv("KFP_NAMESPACE", found.namespace)
        yield found
        _clean_up(found)
        return
    from tuneline_pipelines import connection, runs

    for name in (*_VARIABLES, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(connection, "PAUSES_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(connection, "SETTLE_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    api = kfp_api.KfpApi()
    monkeypatch.setenv("KFP_HOST", api.host)
    yield Endpoint(api.host, "", prefix, api)
    api.close()


@pytest.fixture
def api(endpoint: Endpoint) -> Any:
    """The tests' own server, for what a real one can't be asked to do."""
    if endpoint.api is None:
        pytest.skip("a real KFP takes no orders about its faults, runs and logs")
    return endpoint.api


def _clean_up(endpoint: Endpoint) -> None:
    connection = endpoint.connect()
    runs, recurring, pipelines = connection.runs, connection.recurring_runs, connection.pipelines
    for listing, field, key, delete in (
        (recurring.recurring_run_service_list_recurring_runs, "recurring_runs",
         "recurring_run_id", recurring.recurring_run_service_delete_recurring_run),
        (runs.run_service_list_runs, "runs", "run_id", runs.run_service_delete_run),
        (pipelines.pipeline_service_list_pipelines, "pipelines", "pipeline_id",
         pipelines.pipeline_service_delete_pipeline),
    ):  # fmt: skip
        for one in list(connection.pages("cleaning up", listing, field, **connection.scope)):
            if not (one.display_name or "").startswith(endpoint.prefix):
                continue
            if field == "runs" and one.state in ("PENDING", "RUNNING"):
                connection.call("stopping", runs.run_service_terminate_run, one.run_id)
            if field == "pipelines":
                versions = list(
                    connection.pages(
                        "cleaning up",
                        pipelines.pipeline_service_list_pipeline_versions,
                        "pipeline_versions",
                        pipeline_id=one.pipeline_id,
                    )
                )
                for version in versions:
                    connection.call(
                        "cleaning up",
                        pipelines.pipeline_service_delete_pipeline_version,
                        one.pipeline_id,
                        version.pipeline_version_id,
                    )
            connection.call("cleaning up", delete, getattr(one, key))


@pytest.fixture
def write_package(tmp_path: Path, endpoint: Endpoint) -> Callable[..., Path]:
    """Compiles a pipeline of one step that needs no image of ours; its name and its word differ."""
    from kfp import compiler, dsl

    @dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
    def say(word: str) -> str:
        if word == "fail":
            raise SystemExit("error: the word was fail")
        print(word)
        return word

    def write(name: str = "say", word: str = "hello") -> Path:
        @dsl.pipeline(name=f"{endpoint.prefix}-{name}", description="Says a word.")
        def pipeline(word: str = word) -> str:
            task = say(word=word)
            task.set_caching_options(False)
            task.set_retry(1)
            return task.output

        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        compiler.Compiler().compile(pipeline, str(folder / f"{name}.yaml"))
        return folder / f"{name}.yaml"

    return write


@pytest.fixture(scope="session")
def packages_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of tuneline's own packages, compiled."""
    from tuneline_pipelines.compile import compile_pipelines

    folder = tmp_path_factory.mktemp("packages")
    compile_pipelines(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, endpoint: Endpoint) -> Path:
    """The demo's recipe under a name of this test alone, as runs are named by it."""
    path = tmp_path / f"{endpoint.prefix}.yaml"
    recipe = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
    path.write_text(yaml.safe_dump(recipe))
    return path
