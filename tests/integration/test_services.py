"""`make services-up`: what runs, what it keeps, and that a whole run lands in it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow


def processes(folder: Path) -> dict[str, int]:
    known = json.loads((folder / "processes.json").read_text())
    return {name: process["pid"] for name, process in known.items()}


def test_a_run_lands_in_the_object_store_and_its_version_comes_from_there(
    tracking: Any,
    object_store: Any,
    tiny_model: Path,
    chats: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats[::3]))
    recipe = tmp_path / "colours.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"base_model": str(tiny_model)},
                "data": {"train": str(data), "test_fraction": 0.25},
                "method": {"name": "lora", "target_modules": ["all-linear"], "rank": 16},
                "training": {"epochs": 1, "learning_rate": 0.01, "batch_tokens": 512},
                "evaluation": {"general_text": False},
                "gate": {"min_rows": 10, "champion": "ignore"},
                "registry": {"model_name": "services", "experiment": "services"},
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", "run", str(recipe), "--quiet",
         "--workdir", str(tmp_path / "work")],
        capture_output=True, text=True, check=False,
        env={**os.environ, **tracking.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert tracking.password not in done.stdout + done.stderr
    assert not (tmp_path / "work/mlflow.db").exists()
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    client = mlflow.MlflowClient()
    version = client.get_model_version("services", "1")
    assert version.source is not None
    experiment = client.get_experiment_by_name("services")
    assert experiment is not None
    assert version.source.startswith(f"mlflow-artifacts:/{experiment.experiment_id}/")
    prefix = f"artifacts/{version.source.removeprefix('mlflow-artifacts:/')}"
    listed = object_store.client().list_objects_v2(Bucket="mlflow", Prefix=prefix)
    names = {entry["Key"].removeprefix(prefix) for entry in listed["Contents"]}
    assert "/model/model.safetensors" in names
    mlflow.set_tracking_uri(None)


def test_a_large_file_goes_to_the_object_store_in_parts(
    tracking: Any, object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(5 * 2**20))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 * 2**20))
    (tmp_path / "weights").write_bytes(os.urandom(12 * 2**20))
    mlflow.set_tracking_uri(tracking.uri)
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("parts"))
    client.log_artifact(run.info.run_id, str(tmp_path / "weights"))
    assert run.info.artifact_uri is not None
    key = f"artifacts/{run.info.artifact_uri.removeprefix('mlflow-artifacts:/')}/weights"
    found = object_store.client().head_object(Bucket="mlflow", Key=key)
    assert found["ETag"].strip('"').endswith("-3") and found["ContentLength"] == 12 * 2**20
    mlflow.set_tracking_uri(None)


def test_secrets_are_in_files_of_their_owner_only(server: Any, services_folder: Path) -> None:
    secrets = (server.password, server.s3_secret, server.database.split(":")[2].split("@")[0])
    for path in services_folder.iterdir():
        if path.is_file() and any(secret in path.read_text() for secret in secrets):
            assert path.stat().st_mode & 0o777 == 0o600, path
            assert path.name in ("state.json", "env.sh", "s3.json", "basic_auth.ini")
    for pid in processes(services_folder).values():
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            assert not any(secret in " ".join(process.cmdline()) for secret in secrets)
    exported = (services_folder / "env.sh").read_text()
    assert f"export MLFLOW_TRACKING_URI={server.uri}\n" in exported


def test_called_again_it_starts_what_died_and_what_it_kept_is_there(
    tracking: Any, services_up: Callable[..., Any], services_folder: Path
) -> None:
    import mlflow

    told: list[str] = []
    before = processes(services_folder)
    assert services_up(tell=told.append) == tracking
    assert processes(services_folder) == before
    assert all("was running" in line for line in told) and len(told) == 3
    mlflow.set_tracking_uri(tracking.uri)
    experiment = mlflow.MlflowClient().create_experiment("kept")
    database = psutil.Process(before["postgresql"])
    family = [database, *database.children(recursive=True)]
    workers = psutil.Process(before["mlflow"]).children(recursive=True)
    psutil.Process(before["mlflow"]).kill()
    database.kill()
    psutil.wait_procs(family, timeout=30)  # its children notice; MLflow's hold the port
    assert any(worker.is_running() for worker in workers)
    found = services_up(tell=told.append)
    after = processes(services_folder)
    assert after["seaweedfs"] == before["seaweedfs"] and after["mlflow"] != before["mlflow"]
    kept = mlflow.MlflowClient().get_experiment_by_name("kept")
    assert kept is not None and kept.experiment_id == experiment and found.uri == tracking.uri
    mlflow.set_tracking_uri(None)


def test_what_others_started_is_never_ended(services: ModuleType, tmp_path: Path) -> None:
    """Also if it was given the id of a process that is gone."""
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            began = psutil.Process(other.pid).create_time()
            known = {"mlflow": {"pid": other.pid, "began": began - 100}}
            (tmp_path / "processes.json").write_text(json.dumps(known))
            told: list[str] = []
            services.down(tmp_path, tell=told.append)
            assert other.poll() is None and told == []
            known["mlflow"]["began"] = began
            (tmp_path / "processes.json").write_text(json.dumps(known))
            threading.Thread(target=other.wait).start()  # it is this process's child
            services.down(tmp_path, tell=told.append)
            assert other.wait(10) == -signal.SIGTERM and told == ["mlflow      stopped"]
            assert not (tmp_path / "processes.json").exists()
        finally:
            other.kill()
