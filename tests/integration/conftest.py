"""What the registry's tests need of the services, which run once per session."""

from dataclasses import dataclass
from typing import Any

import pytest


@pytest.fixture(scope="session")
def postgres(server: Any) -> str:
    """SQLAlchemy URL of MLflow's database, whose user may make others."""
    return server.database


@dataclass(frozen=True)
class ObjectStore:
    """An S3 endpoint and the key that it takes."""

    endpoint: str
    key: str
    secret: str

    def client(self) -> Any:
        """One that the environment has no part in."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


@pytest.fixture(scope="session")
def object_store(server: Any) -> ObjectStore:
    """That MLflow keeps its artifacts in."""
    return ObjectStore(server.s3, server.s3_key, server.s3_secret)


@pytest.fixture
def tracking(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process talks to the server."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return server
