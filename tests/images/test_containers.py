"""The pipeline in its image, as locked up as on a cluster, and what the image must hold to.

Run by `make test-images` on a machine with Docker and `tuneline-cpu` (`make images IMAGES=cpu`).
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from docker.models.containers import Container
from mlflow import MlflowClient

from tuneline import __version__
from tuneline.errors import TunelineError
from tuneline_pipelines import containers

pytestmark = pytest.mark.containers

IMAGE = os.environ.get("TUNELINE_TEST_IMAGE", f"tuneline-cpu:{__version__}-python3.11")
ROOT = Path(__file__).parents[2]
LOCKED_UP: dict[str, Any] = {
    "network_mode": "none",
    "read_only": True,
    "tmpfs": {"/tmp": "mode=1777", containers.HOME: "mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}
STEPS = (
    "check_recipe resolve_pool prepare_data finetune_lora evaluate merge register promote".split()
)


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    client.images.get(IMAGE)  # whoever chose these tests wants them to fail without it
    yield client
    client.close()


def run(engine: docker.DockerClient, command: list[str]) -> str:
    return engine.containers.run(IMAGE, command, remove=True, **LOCKED_UP).decode()


def test_the_image_runs_as_a_numbered_user_without_pip_and_names_itself(
    engine: docker.DockerClient,
) -> None:
    config = engine.images.get(IMAGE).attrs["Config"]
    assert config["User"] == f"{containers.USER}:{containers.USER}"
    assert config["Labels"]["org.opencontainers.image.title"] == "tuneline-cpu"
    assert run(engine, ["id", "-u"]).strip() == str(containers.USER)
    for tool in ("pip", "hatchling", "gcc"):
        found = run(engine, ["sh", "-c", f"ls /opt/venv/bin | grep -x {tool} || true"])
        assert found == "", tool
    with pytest.raises(docker.errors.ContainerError):
        run(engine, ["python", "-c", "import pip"])


def test_every_module_of_ours_is_compiled_and_the_compiler_is_the_one_that_kfp_wants(
    engine: docker.DockerClient,
) -> None:
    import kfp

    said = run(
        engine,
        [
            "python",
            "-c",
            "import importlib.util as u, json, kfp, pathlib, tuneline, tuneline_pipelines\n"
            "found = [p for m in (tuneline, tuneline_pipelines)"
            " for p in pathlib.Path(m.__file__).parent.rglob('*.py')]\n"
            "print(json.dumps([kfp.__version__, len(found),"
            " [str(p) for p in found if not pathlib.Path(u.cache_from_source(p)).is_file()]]))",
        ],
    )
    version, modules, uncompiled = json.loads(said)
    assert version.split(".")[:2] == kfp.__version__.split(".")[:2]
    assert modules > 100
    assert uncompiled == []


def test_doctor_is_content_with_the_image_once_the_cache_can_be_written(
    engine: docker.DockerClient,
) -> None:
    command = ["tuneline", "doctor", "--offline"]
    with pytest.raises(docker.errors.ContainerError, match="TUNELINE_CACHE"):
        run(engine, command)
    tmpfs = {**LOCKED_UP["tmpfs"], containers.CACHE: f"uid={containers.USER}"}
    said = engine.containers.run(IMAGE, command, remove=True, **{**LOCKED_UP, "tmpfs": tmpfs})
    assert b" 0 errors" in said


def test_sigterm_reaches_python_behind_the_shell_that_kfp_starts(
    engine: docker.DockerClient,
) -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('stopping', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    container = engine.containers.run(
        IMAGE, ["sh", "-ec", f'python -c "{program}"; echo unreached'], detach=True, **LOCKED_UP
    )
    try:
        wait_for(lambda: b"ready" in container.logs(), 30)
        container.stop(timeout=20)
        assert b"stopping" in container.logs()
        assert b"unreached" not in container.logs()
        assert container.wait()["StatusCode"] == 143
    finally:
        container.remove(force=True)


def test_a_container_s_own_exit_code_is_what_counts_and_nothing_is_left(
    engine: docker.DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """kfp.local calls a container that has already gone a success: about one in fifteen."""
    before = {container.id for container in engine.containers.list(all=True)}
    for code in (3, 0, 1, 3, 1, 0, 137, 3):
        command = ["sh", "-c", f"echo said; exit {code}"]
        assert containers._run(engine, IMAGE, command, {}, **LOCKED_UP) == code
        assert capsys.readouterr().out == "said\n"
    with pytest.raises(RuntimeError, match="there is no image 'tuneline-cpu:never'"):
        containers._run(engine, "tuneline-cpu:never", ["true"], {})
    assert {container.id for container in engine.containers.list(all=True)} == before


@pytest.mark.parametrize(
    ("taken_out", "sentence"),
    [
        ("kfp-*.dist-info", "has no kfp, this is kfp 2"),
        ("tuneline-*.dist-info", "has no tuneline, this is tuneline "),
        # another Python of the base image may be found in its place
        ("../../../bin/python", "(can't start Python|has no tuneline)"),
    ],
)
def test_an_image_that_lacks_what_a_step_needs_is_refused_before_one_starts(
    engine: docker.DockerClient, taken_out: str, sentence: str
) -> None:
    containers.check(IMAGE)
    packages = "/opt/venv/lib/python3*/site-packages"
    made, _ = engine.images.build(
        fileobj=io.BytesIO(
            f"FROM {IMAGE}\nUSER 0\nRUN ls -d {packages}/{taken_out}"
            f" && rm -r {packages}/{taken_out}\nUSER {containers.USER}".encode()
        ),
        rm=True,
    )
    try:
        with pytest.raises(TunelineError, match=f"'{made.id}' {sentence}.*make images"):
            containers.check(str(made.id))
    finally:
        engine.images.remove(made.id)
    with pytest.raises(TunelineError, match=r"no image 'tuneline-cpu:never' on this machine"):
        containers.check("tuneline-cpu:never")


def wait_for(holds: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with a sixteenth of its rows; cross-entropy shows what so few can teach."""
    demo = yaml.safe_load((ROOT / "examples/demo.yaml").read_text(encoding="utf-8"))
    del demo["compare"]
    demo["data"]["train"] = {"path": "demo:train", "weight": 0.06}
    demo["training"]["checkpoint_minutes"] = 0
    demo["evaluation"] |= {"max_rows": 12, "batch_size": 12, "general_text": False}
    demo["evaluation"]["metrics"] = ["exact_match", "cross_entropy"]
    demo["gate"] = {"metric": "cross_entropy", "min_gain": 0.1, "min_rows": 10}
    path = tmp_path_factory.mktemp("recipe") / "demo.yaml"
    path.write_text(yaml.safe_dump(demo), encoding="utf-8")
    return path


def start(recipe: Path, workdir: Path, cache: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        f"{sys.executable} -m tuneline_pipelines.cli run {recipe} --workdir {workdir}"
        f" --image {IMAGE}".split(),
        env={**os.environ, "TUNELINE_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def training_container(engine: docker.DockerClient, workdir: Path) -> Container | None:
    for container in engine.containers.list():
        command = " ".join(container.attrs["Config"]["Cmd"])
        mounted = {mount["Source"] for mount in container.attrs["Mounts"]}
        if str(workdir) in mounted and "finetune_lora" in command:
            return container
    return None


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo's model is or will be; making it takes half a minute."""
    named = os.environ.get("TUNELINE_TEST_CACHE")
    return Path(named) if named else tmp_path_factory.mktemp("cache")


def test_the_demo_runs_in_containers_and_goes_on_where_its_training_was_killed(
    engine: docker.DockerClient,
    recipe: Path,
    demo_cache: Path,
    tmp_path: Path,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first time nothing is to be reached, and nothing can be; the second time MLflow is."""
    workdir = tmp_path / "work"
    first = start(recipe, workdir, demo_cache)
    try:
        wait_for(lambda: list(workdir.glob("checkpoints/**/step-*/*.json")), 300)
        container = training_container(engine, workdir)
        assert container is not None
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
        assert host["NetworkMode"] == "none"
        assert container.attrs["Config"]["User"] == f"{containers.USER}:{containers.USER}"
        container.kill(signal.SIGKILL)
        output, _ = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 1, output
    assert not list(workdir.glob("kfp/*/finetune-lora/adapter/manifest.json"))
    assert not (workdir / "summary.json").exists()

    second = start(recipe, workdir, demo_cache, **server.environment())
    try:
        wait_for(lambda: training_container(engine, workdir), 300)
        container = training_container(engine, workdir)
        assert container is not None
        assert container.attrs["HostConfig"]["NetworkMode"] == "host"
        output, _ = second.communicate(timeout=900)
    finally:
        second.kill()
    assert second.returncode == 0, output
    assert "going on from " in output
    steps = [line.removeprefix("== ") for line in output.splitlines() if line.startswith("== ")]
    assert steps == STEPS
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert summary["alias"] == "champion"
    assert summary["tuned_cross_entropy"] < summary["base_cross_entropy"] - 0.1
    assert summary["registered_version"] == 1
    assert summary["merge_top1_agreement"] == 1.0
    (adapter,) = workdir.glob("kfp/*/finetune-lora/adapter/manifest.json")
    assert adapter.stat().st_uid == containers.USER
    assert training_container(engine, workdir) is None

    assert server.password not in output
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    registry = MlflowClient()
    version = registry.get_model_version_by_alias(summary["model_name"], "champion")
    assert version.version == "1"
    assert version.source.startswith(("mlflow-artifacts:", "models:"))
    (parent,) = [
        run
        for experiment in registry.search_experiments()
        for run in registry.search_runs([experiment.experiment_id])
        if "mlflow.parentRunId" not in run.data.tags
    ]
    assert parent.info.status == "FINISHED"
