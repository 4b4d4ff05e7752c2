"""The scripts of manifests/components, against the real database and object store."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMPONENTS = Path(__file__).parents[2] / "manifests/components"


@pytest.fixture
def database(postgres: str) -> Iterator[dict[str, str]]:
    """libpq's variables for a database of this test's own, with nothing in it."""
    import psycopg2

    parts = urlsplit(postgres)
    assert parts.hostname and parts.username and parts.password
    variables = {
        "PGHOST": parts.hostname,
        "PGPORT": str(parts.port),
        "PGUSER": parts.username,
        "PGPASSWORD": parts.password,
    }
    connection = psycopg2.connect(
        host=parts.hostname, port=parts.port, user=parts.username, password=parts.password,
        dbname="postgres",
    )  # fmt: skip
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE manifests")
        yield {**os.environ, **variables, "PGDATABASE": "manifests"}
        cursor.execute("DROP DATABASE manifests WITH (FORCE)")
    connection.close()


def schema(database: dict[str, str], *arguments: str) -> Any:
    """Run the script."""
    return subprocess.run(
        [sys.executable, COMPONENTS / "mlflow/schema.py", *arguments],
        env=database, capture_output=True, text=True,
    )  # fmt: skip


def test_servers_wait_until_the_schema_is_there(database: dict[str, str]) -> None:
    too_early = schema(database, "wait", "0")
    assert too_early.returncode == 1
    assert "was not migrated" in too_early.stderr
    assert "job tuneline-mlflow-migrate" in too_early.stderr

    command = [sys.executable, COMPONENTS / "mlflow/schema.py", "wait", "100"]
    with subprocess.Popen(command, env=database, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert "waiting" in waiting.stdout.readline()
        migrated = schema(database, "migrate")
        assert migrated.returncode == 0, migrated.stderr
        assert waiting.wait(60) == 0


def test_a_database_that_is_away_is_named(database: dict[str, str]) -> None:
    away = schema({**database, "PGPORT": "1"}, "wait", "0")
    assert away.returncode == 1
    assert "refused" in away.stderr
    assert database["PGPASSWORD"] not in away.stderr + away.stdout


def make_user(server: Any, **variables: str) -> Any:
    """Run the script."""
    return subprocess.run(
        [sys.executable, COMPONENTS / "mlflow/users.py", "0"],
        env={**os.environ, **server.environment(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
             "STEPS_USERNAME": "steps", "STEPS_PASSWORD": "a-password-of-steps", **variables},
        capture_output=True, text=True,
    )  # fmt: skip


def test_steps_have_a_user_who_writes_and_does_not_administer(
    tracking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking.uri)
    of_others = client.create_experiment("of-another-person")
    client.create_registered_model("model-of-another-person")
    made = make_user(tracking)
    assert made.returncode == 0, made.stderr
    changed = make_user(tracking, STEPS_PASSWORD="another-password-of-steps")
    assert changed.returncode == 0, changed.stderr

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "steps")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password-of-steps")
    for experiment in (of_others, client.create_experiment("of-steps")):
        run = client.create_run(experiment)
        client.log_metric(run.info.run_id, "loss", 1.0)
        client.set_tag(run.info.run_id, "kfp.run_id", "1")
        client.log_text(run.info.run_id, "text", "file.txt")
    client.create_registered_model("model-of-steps")
    for name in ("model-of-another-person", "model-of-steps"):
        run_id = run.info.run_id
        version = client.create_model_version(name, f"runs:/{run_id}/model", run_id).version
        client.set_model_version_tag(name, version, "gate", "passed")
        client.set_registered_model_alias(name, "champion", version)
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_experiment(of_others)
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_registered_model("model-of-another-person")
    refused = requests.post(
        f"{tracking.uri}/api/2.0/mlflow/users/create",
        json={"username": "mallory", "password": "a-password-of-mallory"},
        auth=("steps", "another-password-of-steps"),
        timeout=30,
    )
    assert refused.status_code == 403


def test_the_user_of_steps_is_not_the_administrator(server: Any) -> None:
    refused = make_user(server, STEPS_USERNAME=server.username)
    assert refused.returncode == 1
    assert "steps have the administrator's login" in refused.stderr


def test_an_mlflow_that_is_away_is_named(server: Any) -> None:
    away = make_user(server, MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert away.returncode == 1 and "can't be made: " in away.stderr
    assert "a-password-of-steps" not in away.stderr + away.stdout


def test_buckets_are_made_once(object_store: Any) -> None:
    import boto3

    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": object_store.endpoint,
        "AWS_ACCESS_KEY_ID": object_store.key,
        "AWS_SECRET_ACCESS_KEY": object_store.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, COMPONENTS / "object-store/buckets.py", "one-bucket", "another"]
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, timeout=60)
    client = boto3.client(
        "s3",
        endpoint_url=object_store.endpoint,
        aws_access_key_id=object_store.key,
        aws_secret_access_key=object_store.secret,
        region_name="us-east-1",
    )
    names = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    assert {"one-bucket", "another"} <= names
