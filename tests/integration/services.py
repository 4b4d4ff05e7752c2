"""MLflow as a team has it, on this machine: on PostgreSQL, with S3 by SeaweedFS and a login.

    python tests/integration/services.py up       # or make services-up
    . build/services/env.sh
    python tests/integration/services.py down     # or make services-down

Three processes on free ports of 127.0.0.1 that go on after this one. All that they keep is in one
folder: data, logs, random passwords (files that only their owner reads), ports, and the processes'
ids with the time at which each began, so that `down` never ends another process that was given the
same id. `up` starts what is not running and leaves the rest; the data of the last time is there.

The tests of this folder use the same functions.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path("build/services")
BUCKET: Final = "mlflow"
USER: Final = "tuner"
_START_SECONDS: Final = 180
"""MLflow's first start makes its tables: 23 s of CPU time on a slow core."""
_STOP_SECONDS: Final = 30
_PORT_SECONDS: Final = 10
_STATE: Final = "state.json"
_PROCESSES: Final = "processes.json"
_PORTS: Final = range(20000, 22768)
"""SeaweedFS takes each port plus 10000 too; and from 32768 on, connections that begin on this
machine take any for a while."""
_SECOND_PORT: Final = 10000


_MARK: Final = "TUNELINE_SERVICE"
"""Variable that the processes of a service have and hand on to those that they start."""
_LAUNCH: Final = """
import os, subprocess, sys
with open(sys.argv[1], "ab") as log:
    process = subprocess.Popen(
        sys.argv[2:], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
        start_new_session=True,
    )
print(process.pid, flush=True)
os._exit(0)
"""
"""Starts a process that belongs to nobody: it goes on after who asked for it."""


class ServiceError(Exception):
    """A service can't be had or does not start."""


@dataclass
class State:
    """What stays from one start to the next."""

    database_password: str = field(default_factory=lambda: secrets.token_hex(16))
    s3_key: str = field(default_factory=lambda: secrets.token_hex(8))
    s3_secret: str = field(default_factory=lambda: secrets.token_hex(20))
    mlflow_password: str = field(default_factory=lambda: secrets.token_hex(16))
    mlflow_cookie_key: str = field(default_factory=lambda: secrets.token_hex(32))
    database_folder: str = ""
    mlflow_version: str = ""
    """That the tables were last brought up to."""
    ports: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Services:
    """Where everything is, and the logins that it takes."""

    uri: str
    username: str
    password: str
    database: str
    """SQLAlchemy URL of MLflow's tables."""
    s3: str
    """Endpoint of the object store."""
    s3_key: str
    s3_secret: str

    def environment(self) -> dict[str, str]:
        """What a client of MLflow needs."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            # large files go to the object store in parts, past MLflow's own process
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        }

    def s3_environment(self) -> dict[str, str]:
        """What a client of the object store needs."""
        return {
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": self.s3_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def missing() -> str:
    """What can't be had here and how to get it; empty if all is there."""
    if _postgres_programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and _postgres_user() is None:
        return "PostgreSQL does not run as root, and there is no user postgres"
    needed = {"psycopg2": "psycopg2", "boto3": "boto3", "flask_wtf": "Flask-WTF"}
    for module, name in needed.items():
        if find_spec(module) is None:
            return f"{name} is not installed: pip install -e '.[integration]'"
    if _weed() is None:
        return "SeaweedFS is not installed: pip install -e '.[integration]'"
    return ""


def up(
    folder: Path,
    *,
    durable: bool = True,
    mlflow_environment: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Services:
    """Start what is not running, and wait until all of it answers.

    Args:
        folder: of everything that is kept.
        durable: whether the database survives a power cut; tests do without.
        mlflow_environment: further variables of MLflow.
        tell: gets a line for each service.

    Raises:
        ServiceError: a part is not installed, or does not start.
    """
    if reason := missing():
        raise ServiceError(reason)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # PostgreSQL's user has to pass through
    with _locked(folder):
        state = _read_state(folder)
        running = _Processes(folder)
        restarted = _start_database(folder, state, running, tell, durable=durable)
        restarted |= _start_store(folder, state, running, tell)
        if restarted:  # it holds connections of theirs
            running.stop("mlflow")
        _start_mlflow(folder, state, running, tell, mlflow_environment or {})
        found = _services(state)
        _write_environment(folder, found)
    return found


def down(folder: Path, *, tell: Callable[[str], None] = lambda line: None) -> None:
    """End the processes that `up` has started, and no others; data stays.

    Args:
        folder: that was given to `up`.
        tell: gets a line for each process that was ended.
    """
    folder = folder.absolute()
    if not (folder / _PROCESSES).exists():
        return
    with _locked(folder):
        running = _Processes(folder)
        for name in ("mlflow", "seaweedfs", "postgresql"):
            if running.stop(name):
                tell(f"{name:<12}stopped")
        (folder / _PROCESSES).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """End everything and delete what it kept."""
    down(folder)
    state = folder.absolute() / _STATE
    if state.exists():
        shutil.rmtree(_read_state(folder.absolute()).database_folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


class _Processes:
    """The processes that run, by the name of their service."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _PROCESSES
        known = self._path.read_text() if self._path.exists() else "{}"
        self._known: dict[str, dict[str, float]] = json.loads(known)

    def find(self, name: str) -> Any | None:
        """The process of a service, if it runs and is the one that was started."""
        import psutil

        known = self._known.get(name)
        if known is None:
            return None
        try:
            process = psutil.Process(int(known["pid"]))
            same = abs(process.create_time() - known["began"]) < 1
            return process if same and _runs(process) else None
        except psutil.NoSuchProcess:
            return None

    def start(
        self,
        name: str,
        command: list[str],
        is_ready: Callable[[], bool],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a service and wait until it answers.

        Raises:
            ServiceError: it does not; its process is gone then.
        """
        import psutil

        launched = subprocess.run(
            [sys.executable, "-c", _LAUNCH, str(log), *command],
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, **(environment or {}), _MARK: self._mark(name)},
        )
        pid = int(launched.stdout)
        try:
            began = psutil.Process(pid).create_time()
        except psutil.NoSuchProcess:
            began = 0.0
        self._known[name] = {"pid": pid, "began": began}
        self._save()
        deadline = time.monotonic() + _START_SECONDS
        while not is_ready():
            if self.find(name) is None or time.monotonic() > deadline:
                self.stop(name)
                raise ServiceError(
                    f"{name} does not start (see {log}): {log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.2)

    def stop(self, name: str) -> bool:
        """End a service's process and those that it has started; whether one of them ran."""
        import psutil

        process = self.find(name)
        children = process.children(recursive=True) if process else []
        if process is not None:
            # PostgreSQL waits for its clients on SIGTERM
            process.send_signal(signal.SIGINT if name == "postgresql" else signal.SIGTERM)
            _wait_for([process])
            children.append(process)
        found = process is not None
        # until there is none: one that is just being started shows no environment yet
        while alive := [one for one in {*children, *self._left_by(name)} if _runs(one)]:
            found = True
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            _wait_for(alive)
        if self._known.pop(name, None) is not None:
            self._save()
        return found

    def listens(self, name: str, port: int) -> bool:
        """Whether it is this service that has the port, and not what is left of an earlier one."""
        import psutil

        process = self.find(name)
        if process is None:
            return False
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                for connection in one.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                        return True
        return False

    def _left_by(self, name: str) -> Iterator[Any]:
        """Workers of a service whose own process was killed: they hold its port."""
        import psutil

        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_MARK) == self._mark(name):
                    yield process

    def _mark(self, name: str) -> str:
        return f"{self._path.parent}:{name}"

    def _save(self) -> None:
        _write_private(self._path, json.dumps(self._known))


def _runs(process: Any) -> bool:
    """Not one that is dead and that nobody has asked after yet."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for(processes: list[Any]) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _start_database(
    folder: Path,
    state: State,
    running: _Processes,
    tell: Callable[[str], None],
    *,
    durable: bool,
) -> bool:
    if running.find("postgresql"):
        tell(f"{'postgresql':<12}was running on port {state.ports['postgresql']}")
        return False
    running.stop("postgresql")
    programs = _postgres_programs()
    assert programs is not None  # `missing` has looked
    place = _database_folder(folder, state)
    as_owner = _as_postgres_user()
    if not (place / "data" / "PG_VERSION").exists():
        _make_database(place, programs, as_owner, state.database_password)
    port = _port(folder, state, "postgresql")
    command = [
        *as_owner, str(programs / "postgres"), "-D", str(place / "data"), "-p", str(port),
        "-h", "127.0.0.1", "-k", str(place), "-c", f"fsync={'on' if durable else 'off'}",
    ]  # fmt: skip
    running.start("postgresql", command, lambda: _accepts_login(state), folder / "postgresql.log")
    for name in ("mlflow", "auth"):
        _make_table_space(state, name)
    tell(f"{'postgresql':<12}on port {port}")
    return True


def _database_folder(folder: Path, state: State) -> Path:
    """Where PostgreSQL's own user may go, in the folder if it can; made if it is not there."""
    if not state.database_folder:
        place = folder / "postgresql"
        owner = _postgres_user() if os.geteuid() == 0 else None
        if owner is not None:
            probe = [*_as_postgres_user(), "test", "-x", str(folder)]
            if subprocess.run(probe, check=False, cwd="/").returncode:
                digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
                place = Path("/var/tmp") / f"tuneline-services-{digest}"
                # of a folder that was deleted with the password of its database
                shutil.rmtree(place, ignore_errors=True)
        state.database_folder = str(place)
        _write_state(folder, state)
    place = Path(state.database_folder)
    place.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        owner = _postgres_user()
        assert owner is not None  # `missing` has looked
        os.chown(place, owner.pw_uid, owner.pw_gid)
    return place


def _make_database(place: Path, programs: Path, as_owner: list[str], password: str) -> None:
    # what a start that was broken off has left
    shutil.rmtree(place / "data", ignore_errors=True)
    secret = place / "password"
    _write_private(secret, password)
    shutil.chown(secret, place.owner(), place.group())
    done = subprocess.run(
        [
            *as_owner, str(programs / "initdb"), "-D", str(place / "data"), "-U", "mlflow",
            "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8",
            "--locale=C.UTF-8",
        ],
        capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    secret.unlink()
    if done.returncode:
        shutil.rmtree(place / "data", ignore_errors=True)
        raise ServiceError(f"initdb failed: {done.stderr.strip()}")


def _connect(state: State, database: str = "postgres") -> Any:
    import psycopg2

    return psycopg2.connect(
        host="127.0.0.1", port=state.ports["postgresql"], user="mlflow", dbname=database,
        password=state.database_password, connect_timeout=2,
    )  # fmt: skip


def _accepts_login(state: State) -> bool:
    import psycopg2

    try:
        _connect(state).close()
    except psycopg2.OperationalError:
        return False
    return True


def _make_table_space(state: State, name: str) -> None:
    connection = _connect(state)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(f'CREATE DATABASE "{name}"')
    finally:
        connection.close()


def _start_store(
    folder: Path, state: State, running: _Processes, tell: Callable[[str], None]
) -> bool:
    if running.find("seaweedfs"):
        tell(f"{'seaweedfs':<12}was running on port {state.ports['s3']}")
        return False
    running.stop("seaweedfs")
    weed = _weed()
    assert weed is not None  # `missing` has looked
    data = folder / "seaweedfs"
    data.mkdir(mode=0o700, exist_ok=True)
    login = {"accessKey": state.s3_key, "secretKey": state.s3_secret}
    identity = {"name": "mlflow", "credentials": [login], "actions": ["Admin", "Read", "Write"]}
    config = folder / "s3.json"
    _write_private(config, json.dumps({"identities": [identity]}))
    parts = ("master", "volume", "filer")
    ports = [f"-{name}.port={_port(folder, state, name)}" for name in parts]
    command = [
        weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports,
        f"-s3.port={_port(folder, state, 's3')}", f"-s3.config={config}",
        "-webdav=false", "-admin.ui=false",
    ]  # fmt: skip
    log = folder / "seaweedfs.log"
    running.start("seaweedfs", command, lambda: _has_bucket(state), log)
    tell(f"{'seaweedfs':<12}S3 on port {state.ports['s3']}, bucket {BUCKET}")
    return True


def _has_bucket(state: State) -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{state.ports['s3']}",
        aws_access_key_id=state.s3_key,
        aws_secret_access_key=state.s3_secret,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except ClientError as error:
        return error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
    except BotoCoreError:
        return False
    return True


def _start_mlflow(
    folder: Path,
    state: State,
    running: _Processes,
    tell: Callable[[str], None],
    further: Mapping[str, str],
) -> None:
    if running.find("mlflow"):
        tell(f"{'mlflow':<12}was running on port {state.ports['mlflow']}")
        return
    running.stop("mlflow")
    port = _port(folder, state, "mlflow")
    config = folder / "basic_auth.ini"
    _write_private(
        config,
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {_database_uri(state, 'auth')}\n"
        f"admin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # a check of a password is 0.1 s of PBKDF2, once per request
        "auth_cache_ttl_seconds = 600\n",
    )
    backend = _database_uri(state, "mlflow")
    installed = metadata.version("mlflow")
    if state.mlflow_version not in ("", installed):
        _migrate(backend, folder / "mlflow.log")
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        # any port: a tunnel or proxy on this machine has another
        "--allowed-hosts", "127.0.0.1:*,localhost:*",
        "--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/artifacts",
    ]  # fmt: skip
    environment = {
        # not on the command line, which every user of the machine may read
        "MLFLOW_BACKEND_STORE_URI": backend,
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": state.mlflow_password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": state.mlflow_cookie_key,
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{state.ports['s3']}",
        "AWS_ACCESS_KEY_ID": state.s3_key,
        "AWS_SECRET_ACCESS_KEY": state.s3_secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # no job of MLflow's own is used, and its seven idle runners take 1.4 GB
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **further,
    }
    url = f"http://127.0.0.1:{port}/health"
    running.start(
        "mlflow",
        command,
        lambda: _answers(url) and running.listens("mlflow", port),
        folder / "mlflow.log",
        environment,
    )
    state.mlflow_version = installed
    _write_state(folder, state)
    tell(f"{'mlflow':<12}on port {port}, user {USER}")


def _migrate(backend: str, log: Path) -> None:
    """Bring the tables of an older MLflow up to the installed one, which refuses them else."""
    # as `mlflow db upgrade URI`, whose password the command line would show
    code = "import os; from mlflow.cli import cli; cli(['db', 'upgrade', os.environ['URI']])"
    with log.open("ab") as output:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "URI": backend},
            stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ServiceError(f"MLflow's tables can't be brought up to this version: see {log}")


def _database_uri(state: State, name: str) -> str:
    # plain postgresql:// would pick psycopg 3, where that is installed
    login = f"mlflow:{state.database_password}"
    return f"postgresql+psycopg2://{login}@127.0.0.1:{state.ports['postgresql']}/{name}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _services(state: State) -> Services:
    return Services(
        uri=f"http://127.0.0.1:{state.ports['mlflow']}",
        username=USER,
        password=state.mlflow_password,
        database=_database_uri(state, "mlflow"),
        s3=f"http://127.0.0.1:{state.ports['s3']}",
        s3_key=state.s3_key,
        s3_secret=state.s3_secret,
    )


def _write_environment(folder: Path, found: Services) -> None:
    values = {**found.environment(), **found.s3_environment()}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    _write_private(folder / "env.sh", "\n".join([*lines, ""]))


def _port(folder: Path, state: State, name: str) -> int:
    """The port of the last time, or another one if somebody has it now."""
    port = state.ports.get(name)
    # of a process that was killed the last thread may be closing it just now
    deadline = time.monotonic() + _PORT_SECONDS
    while port is not None and not _is_free(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    while port is None or not (_is_free(port) and _is_free(port + _SECOND_PORT)):
        port = random.choice(_PORTS)
        if port in state.ports.values():
            port = None
    state.ports[name] = port
    _write_state(folder, state)
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # connections that just ended are no listener
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _postgres_programs() -> Path | None:
    """The folder with PostgreSQL's server programs: Debian keeps them off the path."""
    found = shutil.which("pg_ctl")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "postgres").exists()), None)


def _postgres_user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _as_postgres_user() -> list[str]:
    owner = _postgres_user()
    if os.geteuid() != 0 or owner is None:
        return []
    return ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]


def _weed() -> str | None:
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def _read_state(folder: Path) -> State:
    path = folder / _STATE
    if path.exists():
        return State(**json.loads(path.read_text()))
    state = State()
    _write_state(folder, state)
    return state


def _write_state(folder: Path, state: State) -> None:
    _write_private(folder / _STATE, json.dumps(asdict(state), indent=2))


def _write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner reads, from its first moment on."""
    aside = path.with_name(f"{path.name}.partial")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    aside.rename(path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of two at once, the second waits."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="MLflow on PostgreSQL and S3, on this machine.")
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"({FOLDER})")
    options = parser.parse_args()
    try:
        if options.command == "down":
            down(options.folder, tell=print)
            return 0
        found = up(options.folder, tell=print)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{found.uri}, user {found.username}\n. {shlex.quote(str(options.folder / 'env.sh'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
