"""`tuneline doctor` against a real MLflow with a login, and a real object store."""

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from tuneline_pipelines.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    """Runs the command; name of what was looked at -> its finding."""

    def run() -> dict[str, Any]:
        code = main(["doctor", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert code == (0 if told["ok"] else 1)
        return {check["name"]: check for check in told["checks"]}

    return run


def keys_of(object_store: Any, bucket: str) -> list[str]:
    found = object_store.client().list_objects_v2(Bucket=bucket, Prefix="")
    return [entry["Key"] for entry in found.get("Contents", ()) if "doctor" in entry["Key"]]


def test_a_server_that_does_all_is_green_and_keeps_nothing(
    tracking: Any, object_store: Any, report: Callable[[], dict[str, Any]]
) -> None:
    told = report()
    assert told["MLFLOW_TRACKING_URI"]["value"] == tracking.uri
    assert told["MLflow version"]["value"] == metadata.version("mlflow")
    assert told["MLflow login"]["value"] == f"accepted ({tracking.username})"
    assert told["MLflow registry"]["level"] == "ok"
    assert "takes, lists and removes a file" in told["MLflow artifacts"]["value"]
    assert keys_of(object_store, "mlflow") == []


def test_a_wrong_password_is_told_without_it(
    tracking: Any, report: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    told = report()
    assert told["MLFLOW_TRACKING_URI"]["level"] == "ok"  # it is there
    assert told["MLflow login"]["level"] == "error"
    assert "refused the credentials" in told["MLflow login"]["value"]
    assert "MLflow registry" not in told
    assert "wrong-password" not in json.dumps(told) and tracking.password not in json.dumps(told)


def test_a_login_that_may_only_read_is_a_warning(
    tracking: Any, report: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    requests.post(
        f"{tracking.uri}/api/2.0/mlflow/users/create", timeout=30,
        auth=(tracking.username, tracking.password),
        json={"username": "reader", "password": "a-password-of-reader"},
    ).raise_for_status()  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-of-reader")
    told = report()
    assert told["MLflow login"]["value"] == "accepted (reader)"
    assert told["MLflow artifacts"]["level"] == "warning"
    assert "may not write to the experiment Default" in told["MLflow artifacts"]["value"]


def test_checkpoints_in_an_object_store_are_tried_with_an_object(
    object_store: Any, report: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": object_store.endpoint, "AWS_ACCESS_KEY_ID": object_store.key,
        "AWS_SECRET_ACCESS_KEY": object_store.secret, "AWS_DEFAULT_REGION": "us-east-1",
        "TUNELINE_CHECKPOINTS": "s3://mlflow/checkpoints",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    told = report()["TUNELINE_CHECKPOINTS"]
    assert told["value"] == "s3://mlflow/checkpoints takes, gives and removes an object"
    assert keys_of(object_store, "mlflow") == []
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "s3://nowhere/checkpoints")
    told = report()["TUNELINE_CHECKPOINTS"]
    assert (told["level"], told["advice"]) == ("error", "make the bucket, or name another")
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "s3://mlflow/checkpoints")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    told = report()["TUNELINE_CHECKPOINTS"]
    assert told["level"] == "error" and "credentials are not valid" in told["advice"]
    assert "another-secret" not in json.dumps(told)
