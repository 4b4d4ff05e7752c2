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
