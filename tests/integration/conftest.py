"""A real MLflow server for the registry's tests: PostgreSQL, S3 on SeaweedFS, basic auth.

It runs once per session, as `make services-up` starts it. Where a part can't be had, the tests are
skipped and say which one is missing; in CI they fail.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest


@pytest.fixture(scope="session")
def services() -> ModuleType:
    """The module that starts them."""
    spec = importlib.util.spec_from_file_location(
        "tuneline_services", Path(__file__).with_name("services.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


WEBHOOKS = {
    # they go to this machine, without TLS
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",  # it remembers for so long that there was no webhook
}


@pytest.fixture(scope="session")
def services_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they keep everything."""
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="session")
def services_up(services: ModuleType, services_folder: Path) -> Callable[..., Any]:
    """Starts those that do not run, as the tests want them."""
    return partial(services.up, services_folder, durable=False, mlflow_environment=WEBHOOKS)


@pytest.fixture(scope="session")
def server(
    services: ModuleType,
    services_folder: Path,
    services_up: Callable[..., Any],
    lacking: Callable[[str, str], NoReturn],
) -> Iterator[Any]:
    """All of them, running."""
    if reason := services.missing():
        lacking("services", reason)
    try:
        yield services_up()
    finally:
        services.remove(services_folder)


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
