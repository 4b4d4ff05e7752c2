"""`tuneline doctor` on one machine: every fault is real, and is told with what to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tuneline_pipelines.cli import main
from tuneline_pipelines.doctor import machine, mlflow_server, storage

ROOT = Path(__file__).parents[2]
Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Report:
    """Runs the command; name of what was looked at -> its finding, and `exit_code`."""

    def run(*arguments: str) -> dict[str, Any]:
        code = main(["doctor", "--json", "--workdir", str(tmp_path / "work"), *arguments])
        told = json.loads(capsys.readouterr().out)
        errors = [check for check in told["checks"] if check["level"] == "error"]
        assert code == (1 if errors else 0) and told["ok"] == (not errors)
        return {"exit_code": code, **{check["name"]: check for check in told["checks"]}}

    return run


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own."""
    folder.mkdir()
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a tmpfs needs root on Linux")
    command = ["mount", "-t", "tmpfs", "-o", options, "tuneline-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_sound_machine_is_green_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tuneline_pipelines.cli import main\n"
        f"code = main(['doctor', '--workdir', {str(tmp_path)!r}])\n"
        "print(sorted({'torch', 'mlflow', 'transformers', 'kfp', 'kubernetes', 'boto3'}"
        " & set(sys.modules)))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 errors\n[]\n") and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has everything but kfp, has no peft in its range, and lost tokenizers."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    (source,) = {Path(path) for path in sys.path if Path(path, "pydantic").is_dir()}
    for entry in source.iterdir():
        if not entry.name.startswith(("kfp", "peft", "__editable__", "_tuneline")) and (
            entry.name != "tokenizers"
        ):
            (target / entry.name).symlink_to(entry)
    (target / "peft-0.3.0.dist-info").mkdir()
    (target / "peft-0.3.0.dist-info/METADATA").write_text("Name: peft\nVersion: 0.3.0\n")
    return folder / "bin/python"


def test_an_image_without_kfp_or_with_wrong_packages_is_told_before_any_step(
    bare_python: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(bare_python), "-m", "tuneline_pipelines.cli", "doctor", "--workdir", str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}/components:{ROOT}/pipelines",
             "TUNELINE_CACHE": str(tmp_path)},
    )  # fmt: skip
    told = {line.split()[1] + line.split()[2]: line for line in done.stdout.splitlines() if line}
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error    package peft" in done.stdout and "0.3.0 is out of the range" in done.stdout
    assert "its module can't be found: pip install --force-reinstall" in done.stdout
    (line,) = (line for line in told.values() if line.startswith("error    kfp"))
    assert "kfp and kfp-kubernetes can't be found" in line
    assert "every step would end at once" in line and "pip install 'kfp==2.17.*'" in line
    assert "ok       temporary files" in done.stdout  # the rest is looked at all the same
    assert done.stderr.partition(" checks failed: ")[2].rstrip().split(", ") == [
        "package kfp-server-api",
        "package peft",
        "package tokenizers",
        "kfp",
    ]


def test_packages_that_another_kfp_compiled_are_refused(report: Report, tmp_path: Path) -> None:
    package = (ROOT / "tests/golden/promote.yaml").read_text()
    (tmp_path / "promote.yaml").write_text(package)
    assert report("--packages", str(tmp_path))["kfp"]["level"] == "ok"
    (tmp_path / "promote.yaml").write_text(package.replace("kfp-2.17.0", "kfp-2.9.0"))
    told = report("--packages", str(tmp_path))["kfp"]
    assert told["level"] == "error" and "were compiled with kfp-2.9.0" in told["value"]


@pytest.mark.parametrize(
    ("script", "level", "value"),
    [
        ("printf 'NVIDIA L4, 23034 MiB, 550.54\\nNVIDIA L4, 23034 MiB, 550.54\\n'", "ok",
         "2 x NVIDIA L4, 23034 MiB, 550.54"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "error",
         "nvidia-smi fails (Failed to initialize NVML: Driver/library version mismatch)"),
        ("exec sleep 60", "error", "nvidia-smi does not answer within 1 s"),
    ],
)  # fmt: skip
def test_accelerators_are_what_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, level: str, value: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "_DRIVER_SECONDS", 1)
    found, *further = machine.accelerators()
    assert (found.level, found.value) == (level, value)
    if level == "ok" and machine.metadata.version("torch").endswith("+cpu"):
        assert "build for CPUs" in further[0].value and further[0].level == "error"


def test_a_folder_that_can_not_be_written_is_an_error(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / "locked/run"))
        told = report()["TUNELINE_CHECKPOINTS"]
        assert told["level"] == "error" and "Permission denied" in told["value"]
        return
    with mounted(tmp_path / "volume", "ro,size=4m") as volume:  # root may write anywhere else
        monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(volume / "run"))
        told = report()["TUNELINE_CHECKPOINTS"]
    assert told["level"] == "error"
    assert told["value"] == f"{volume} can't be written (Read-only file system)"
    assert told["advice"] == "set TUNELINE_CHECKPOINTS to a folder that can"


def test_a_work_folder_matters_only_where_something_runs_in_it(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    told = report("--workdir", str(tmp_path / "file/work"))["work folder"]
    assert told["level"] == "error" and told["value"] == f"{tmp_path / 'file'} is no folder"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuneline-runs").write_text("")
    assert main(["doctor", "--json"]) == 0  # as in a pod, whose own folder is read-only


def test_a_full_volume_is_an_error_and_a_nearly_full_one_a_warning(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "volume", "size=4m") as volume:
        monkeypatch.setenv("TUNELINE_CACHE", str(volume))
        told = report()["TUNELINE_CACHE"]
        assert told["level"] == "warning" and told["value"] == f"{volume}, 4 MB free"
        (volume / "weights").write_bytes(bytes(4 * 2**20 - 100_000))
        told = report()["TUNELINE_CACHE"]
        assert told["level"] == "error"
        assert told["value"] == f"{volume} is full (No space left on device)"
        assert [path.name for path in volume.iterdir()] == ["weights"]


def test_a_file_or_a_broken_link_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    below_a_file = storage.folder("x", tmp_path / "file/cache", "name another")
    assert below_a_file.value == f"{tmp_path / 'file'} is no folder"
    link = storage.folder("x", tmp_path / "link", "name another")
    assert (link.level, link.value) == ("error", f"{tmp_path / 'link'} is a link to nothing")
    new = storage.folder("x", tmp_path / "a/b", "name another")
    assert "(made when needed)" in new.value and not (tmp_path / "a").exists()


def test_an_object_store_that_is_away_or_misnamed_is_an_error(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "gs://bucket/prefix")
    assert "name a folder or s3://bucket/prefix" in report()["TUNELINE_CHECKPOINTS"]["value"]
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "s3://bucket/prefix")
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port()}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    told = report()["TUNELINE_CHECKPOINTS"]
    assert told["level"] == "error" and told["advice"] == "check AWS_ENDPOINT_URL"
    assert "a-secret" not in json.dumps(told)
    assert report("--offline")["TUNELINE_CHECKPOINTS"]["value"] == "s3://bucket/prefix, not tried"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def listening(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handle(self)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def page(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>Sign in</html>")


def test_an_mlflow_that_is_away_silent_or_something_else_is_an_error(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_server, "_SECONDS", 0.5)
    uri = f"http://ada:a-password@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told = report()["MLFLOW_TRACKING_URI"]
    assert told["level"] == "error" and "can't be reached (Connection refused)" in told["value"]
    assert "a-password" not in json.dumps(told)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in report()["MLFLOW_TRACKING_URI"]["value"]
    with listening(page) as host:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", host)
        assert "is no MLflow server" in report()["MLFLOW_TRACKING_URI"]["value"]
    with listening(lambda handler: handler.send_error(502)) as host:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", host)
        assert "answers 502" in report()["MLFLOW_TRACKING_URI"]["value"]


def test_a_store_of_its_own_is_not_made_by_looking(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert report()["MLFLOW_TRACKING_URI"]["level"] == "ok"
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / "mlflow.db").write_text("no database at all, but a text of some length")
    told = report()["MLFLOW_TRACKING_URI"]
    assert told["level"] == "error" and "file is not a database" in told["value"]


def test_a_wrong_pool_or_pools_file_is_told_with_what_there_is(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report("--pool", "cpu")["pool cpu"]["value"] == "no accelerator, 2 CPU, 8Gi"
    told = report("--pool", "gpus")["pool gpus"]
    assert told["level"] == "error"
    assert told["value"].endswith("pools are gpu, cpu. Did you mean 'gpu'?")
    (tmp_path / "pools.yaml").write_text("pools: {a: {count: 1}}")
    monkeypatch.setenv("TUNELINE_POOLS", str(tmp_path / "pools.yaml"))
    assert "accelerator and count belong together" in report()["pools"]["value"]


def test_what_a_recipe_names_is_looked_for(
    report: Report, tmp_path: Path, tiny_model: Path, chats_file: Path
) -> None:
    recipe = tmp_path / "r.yaml"

    def write(model: Path | str, data: Path | str, **further: object) -> None:
        recipe.write_text(
            json.dumps({"model": {"base_model": str(model)}, "data": {"train": str(data)},
                        "registry": {"model_name": "x"}, **further})
        )  # fmt: skip

    write(tiny_model, chats_file)
    told = report(str(recipe))
    assert told["recipe"]["level"] == "ok" and told["exit_code"] == 0
    assert told[f"data {chats_file}"]["value"] == "1 file"
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    (half / "model.safetensors").rename(half / "model.bin")
    write(half, tmp_path / "nothing.jsonl", evaluation={"forgetting_sets": {"x": "no.txt"}})
    told = report(str(recipe))
    assert "which can run code when loaded" in told[f"base model {half}"]["value"]
    assert "No such file" in told[f"data {tmp_path / 'nothing.jsonl'}"]["value"]
    assert told["evaluation"]["value"] == "no.txt is no file"
    write("hf://org/name@main", "hf://org/rows")
    told = report(str(recipe))  # tests are offline
    assert "not pinned" in told["base model hf://org/name@main"]["value"]
    write(f"hf://org/name@{'0' * 40}", chats_file)
    assert "HF_HUB_OFFLINE" in report(str(recipe))[f"base model hf://org/name@{'0' * 40}"]["value"]
    recipe.write_text("model: {base: demo}")
    told = report(str(recipe))
    assert told["recipe"]["level"] == "error"
