"""The script of manifests/components/champions, against a registry."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneline.register import tags
from tuneline.register.champion import CHAMPION

pytestmark = pytest.mark.slow  # MLflow makes a database, and is imported three times

SCRIPT = Path(__file__).parents[2] / "manifests/components/champions/champions.py"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two models with two versions, of which one has a champion."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    for name in ("orders", "letters"):
        client.create_registered_model(name)
        for _ in range(2):
            client.create_model_version(name, "somewhere", tags={tags.MODEL_DIGEST: "sha256:0"})
    client.set_registered_model_alias("orders", CHAMPION, "1")
    return uri


def look(days: str, **environment: str) -> Any:
    return subprocess.run(
        [sys.executable, SCRIPT, days],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_champion_that_is_too_old_fails_the_job_and_is_named(registry: str) -> None:
    done = look("45")
    assert (done.returncode, done.stdout) == (
        0,
        "ok     orders version 1: 0 days old, at most 45\n",
    )
    done = look("0.000001")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("STALE  orders version 1:") and done.stdout.count("\n") == 1


def test_an_mlflow_that_can_not_be_asked_fails_the_job(registry: str) -> None:
    done = look("45", MLFLOW_TRACKING_URI="http://127.0.0.1:1", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == 1 and "error: " in done.stderr
    assert "Traceback" not in done.stderr
