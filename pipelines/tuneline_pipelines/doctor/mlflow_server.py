"""MLflow, asked in the way of the steps: reachable, login, registry, artifact store.

The first question goes out with the standard library, since a server that is away is to be known
before MLflow is imported. The artifact store is tried with a file of some bytes below the
experiment's own location, which is removed again.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from tuneline.errors import RegistryError, TunelineError
from tuneline.tracking import mlflow_errors, open_client, safe_uri, tracking_uri
from tuneline_pipelines.doctor import storage
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

if TYPE_CHECKING:
    from mlflow import MlflowClient

VARIABLE: Final = "MLFLOW_TRACKING_URI"
_SECONDS: Final = 5
_AT_ONCE: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # of a file, a busy store may take its time
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
WITH_A_LOGIN: Final = "api/2.0/mlflow/registered-models/search"
"""Any call that a server with a login answers with 401."""
_LONGEST_VERSION: Final = 40
_INVALID_HOST: Final = "Invalid Host header"
_ROOT: Final = "tuneline-doctor"


def checks(experiment: str = "", *, offline: bool = False) -> Iterator[Finding]:
    """All of MLflow, as far as the answer before allows.

    Args:
        experiment: whose artifact location is tried; empty or not there: `Default`'s.
        offline: look at nothing on other machines.
    """
    uri = tracking_uri()
    if not uri:
        yield ok(VARIABLE, "not set: a local run keeps its own store in its work folder")
        return
    remote = uri.startswith(("http://", "https://"))
    if offline and not uri.startswith("sqlite:"):
        yield ok(VARIABLE, f"{safe_uri()}, not tried")
        return
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():  # opening it would make it
            yield storage.folder(VARIABLE, path.parent, f"name another file in {VARIABLE}")
            return
    if remote:
        found = reachable(uri)
        yield found
        if found.level == "error":
            return
    with _environment(_AT_ONCE):
        yield from _as_a_step(experiment, remote=remote)


def reachable(uri: str, *, name: str = VARIABLE) -> Finding:
    """Whether MLflow answers, without a login.

    Args:
        uri: of the server; a login in it is neither sent nor shown.
        name: of the finding.
    """
    parts = urlsplit(uri)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    try:
        with _get(f"{place}/health") as answer:
            said = answer.read(100).strip()
    except urllib.error.HTTPError as fault:
        fault.close()
        if fault.code in (401, 403):
            return ok(name, f"{place}, behind something that wants a login first ({fault.code})")
        return error(
            name,
            f"{place} answers {fault.code} and not as MLflow does",
            "check the address and its path, and the server's log",
        )
    except (OSError, ValueError, HTTPException) as fault:
        return error(name, f"{place} can't be reached ({_reason(fault)})", _advice(fault))
    if said != b"OK":
        return error(name, f"{place} answers and is no MLflow server", "check the address")
    return ok(name, place)


def wants_login(uri: str) -> bool | None:
    """Whether a server that answers refuses who has no login; None: not to be told."""
    place = f"{uri.rstrip('/')}/{WITH_A_LOGIN}"
    try:
        with _get(place):
            return False
    except urllib.error.HTTPError as fault:
        fault.close()
        return True if fault.code == 401 else None
    except (OSError, ValueError, HTTPException):
        return None


def _get(url: str) -> Any:
    context = _context() if url.startswith("https:") else None
    return urllib.request.urlopen(url, timeout=_SECONDS, context=context)


def _context() -> ssl.SSLContext:
    """What the client of MLflow trusts and shows, from the same variables."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context = ssl._create_unverified_context()  # what MLflow itself is told to do
    else:
        from certifi import where

        variables = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        trusted = next((os.environ[name] for name in variables if os.environ.get(name)), where())
        if Path(trusted).is_dir():
            context = ssl.create_default_context(capath=trusted)
        else:
            context = ssl.create_default_context(cafile=trusted)
    if own := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        context.load_cert_chain(own)
    return context


def _reason(fault: Exception) -> str:
    inner = getattr(fault, "reason", None)
    if isinstance(inner, OSError):
        return inner.strerror or str(inner)
    return str(inner or getattr(fault, "strerror", None) or fault)


def _advice(fault: Exception) -> str:
    inner = getattr(fault, "reason", fault)
    if isinstance(inner, ssl.SSLError):
        return "name the certificates to trust in MLFLOW_TRACKING_SERVER_CERT_PATH"
    return f"start the server, or check {VARIABLE}"


def _as_a_step(experiment: str, *, remote: bool) -> Iterator[Finding]:
    try:
        client = open_client()
    except RegistryError as fault:
        text = str(fault)
        advice = ""
        if _INVALID_HOST in text:
            text = f"{safe_uri()} does not take this host name"
            advice = "add it to the server's --allowed-hosts"
        yield error("MLflow login" if remote else VARIABLE, text, advice)
        return
    who = os.environ.get("MLFLOW_TRACKING_USERNAME") or urlsplit(tracking_uri()).username
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if remote:
        yield ok("MLflow login", f"accepted ({'a token' if token and not who else who or 'none'})")
    else:
        yield ok(VARIABLE, f"{safe_uri()} opens")
    if remote:
        yield _version()
    try:
        with mlflow_errors("reading the model registry"):
            client.search_registered_models(max_results=1)
    except RegistryError as fault:
        yield error("MLflow registry", str(fault))
    else:
        yield ok("MLflow registry", "answers")
    yield _artifacts(client, experiment, remote=remote)


def _version() -> Finding:
    """Of the server; a server with a login tells it after that only."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    name, own = "MLflow version", metadata.version("mlflow")
    with mlflow_errors("asking for the version"):
        creds = get_default_host_creds(tracking_uri())
        answer: Any = http_request(creds, "/version", "GET")
    version = answer.text.strip()
    if answer.status_code != 200 or not version[:1].isdigit() or len(version) > _LONGEST_VERSION:
        return warning(
            name, f"not to be seen ({answer.status_code})", f"it should be {own}'s major version"
        )
    if version.split(".")[0] != own.split(".")[0]:
        return error(
            name,
            f"{version}, and the client here is {own}",
            "use one major version on both sides",
        )
    return ok(name, version)


def _artifacts(client: MlflowClient, experiment: str, *, remote: bool) -> Finding:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = "MLflow artifacts"
    with mlflow_errors("looking for an experiment"):
        found = client.get_experiment_by_name(experiment) if experiment else None
        found = found or client.get_experiment_by_name("Default")
    if found is None or not found.artifact_location:
        return warning(name, "not tried: there is no experiment yet")
    place = found.artifact_location.rstrip("/")
    if remote and place.startswith(("/", ".", "file:")):
        return error(
            name,
            f"{found.name} keeps them in {place}, a folder that the server means on its own "
            "disk and clients write to on theirs",
            "start the server with --serve-artifacts and make a new experiment",
        )
    folder = f"{_ROOT}/{storage.this_machine()}"
    with mlflow_errors("opening the artifact store"):
        store: Any = get_artifact_repository(f"{place}/{folder}")
    there, fault = _written_and_listed(store)
    if fault is not None and _is_forbidden(fault):
        return warning(
            name,
            f"this login may not write to the experiment {found.name}",
            "not tried further: a run makes an experiment of its own, or names one in "
            "registry.experiment that the login may write to",
        )
    try:
        with _store_errors("removing a file"):
            store.delete_artifacts()
    except TunelineError as late:
        if fault is None:
            return warning(
                name, f"{place} takes files; one of some bytes stays in {folder} ({late})"
            )
    if fault is not None:
        return error(name, str(fault), "look at the server's log: it needs access to its store")
    if there != ["probe.txt"]:
        return error(name, f"{place} does not list what was written ({there})", "look at the store")
    return ok(name, f"{place} takes, lists and removes a file")


def _written_and_listed(store: Any) -> tuple[list[str], TunelineError | None]:
    try:
        with tempfile.TemporaryDirectory() as aside:
            probe = Path(aside) / "probe.txt"
            probe.write_text("written by tuneline doctor\n")
            with _store_errors("uploading a file"):
                store.log_artifact(str(probe))
        with _store_errors("listing artifacts"):
            return [entry.path for entry in store.list_artifacts()], None
    except TunelineError as fault:
        return [], fault


def _is_forbidden(fault: TunelineError) -> bool:
    response = getattr(fault.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    return status == 403 or getattr(fault.__cause__, "error_code", "") == "PERMISSION_DENIED"


@contextlib.contextmanager
def _store_errors(doing: str) -> Iterator[None]:
    """Errors of the stores' own clients too: a location may be written to from here."""
    faults: tuple[type[Exception], ...] = (OSError,)
    with contextlib.suppress(ImportError):  # an extra; a server that proxies needs none of it
        from botocore.exceptions import BotoCoreError, ClientError

        faults = (OSError, BotoCoreError, ClientError)
    try:
        with mlflow_errors(doing):
            yield
    except faults as fault:
        raise RegistryError(f"MLflow at {safe_uri()}: {doing}: {fault}") from fault


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
