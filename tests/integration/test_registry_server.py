"""Registration against a real MLflow server: right model, no orphan, clear errors, no secret."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import RegistryError
from tuneline.register.overview import events
from tuneline.register.promote import Request, promote
from tuneline.register.register import register
from tuneline.tracking import Untracked, tracked

pytestmark = pytest.mark.slow

Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def client(tracking: Any) -> Iterator[Any]:
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@contextmanager
def proxy(target: str, certificate: tuple[Path, Path] | None = None) -> Iterator["Proxy"]:
    """A TCP proxy in front of the server, in a thread of its own."""
    running = Proxy(target, certificate)
    thread = threading.Thread(target=running.run)
    thread.start()
    running.ready.wait(10)
    try:
        yield running
    finally:
        running.stop()
        thread.join()


class Proxy:
    """Forwards requests; loses answers, or refuses with 503, as often as it is told to."""

    def __init__(self, target: str, certificate: tuple[Path, Path] | None) -> None:
        self.host, _, port = target.removeprefix("http://").partition(":")
        self.target_port = int(port)
        self.port = 0
        self.ready = threading.Event()
        self.refuse = 0
        """Next requests to answer with 503."""
        self.lose: list[bytes] = []
        """Parts of request lines whose answer is lost once each, after the server has done it."""
        self.lost = 0
        self._context = None
        if certificate:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)

    def run(self) -> None:
        asyncio.run(self._serve())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def _serve(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self._stopped.wait()
        server.close()

    async def _handle(self, reader: Any, writer: Any) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (int(line.split(b":")[1]) for line in head.split(b"\r\n")
                     if line.lower().startswith(b"content-length:")), 0,
                )  # fmt: skip
                body = await reader.readexactly(length)
                if self.refuse:
                    self.refuse -= 1
                    writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
                    continue
                answer = await self._forward(head, body)
                line = head.split(b"\r\n")[0]
                if lost := next((part for part in self.lose if part in line), None):
                    self.lose.remove(lost)
                    self.lost += 1
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        upstream_reader, upstream = await asyncio.open_connection(self.host, self.target_port)
        upstream.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
        answer = await upstream_reader.read()
        upstream.close()
        return answer.replace(b"connection: close\r\n", b"")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", folder / "key.pem", "-out", folder / "ca.pem", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "ca.pem", folder / "key.pem"


LOAD = """
import sys, mlflow, torch
tokens = torch.arange(1, 40).unsqueeze(0)
kind, where = sys.argv[1:]
if kind == "folder":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(where)
else:
    flavor = mlflow.transformers if kind == "transformers" else mlflow.pyfunc
    loaded = flavor.load_model(where)
    if kind == "pyfunc":
        print(type(loaded.predict(["apple number 3"])).__name__)
        loaded = loaded._model_impl.pipeline
    model = loaded.model
logits = model.eval().float()(tokens).logits
print(f"{float(logits.abs().sum()):.3f} {logits.argmax(-1).tolist()}")
"""


def fresh(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_both_ways_of_mlflow_load_the_registered_model(
    client: Any, tracking: Any, make_candidate: Make
) -> None:
    model, report = make_candidate("load")
    register(model, report, "load", "", Untracked())
    expected = fresh("folder", str(model))
    for kind in ("transformers", "pyfunc"):
        assert fresh(kind, "models:/load/1", **tracking.environment()) == expected


def test_a_version_says_where_it_comes_from(client: Any, make_candidate: Make) -> None:
    import mlflow

    model, report = make_candidate("origin")
    with tracked("run-1", "register", experiment="origin") as step:
        version = register(model, report, "origin", "run-1", step)
    found = client.get_model_version("origin", str(version))
    run = client.get_run(found.run_id)
    assert run.data.tags["kfp.task"] == "register"
    assert {d.dataset.name: d.tags[0].value for d in run.inputs.dataset_inputs} == {
        "train": "training", "test": "evaluation",
    }  # fmt: skip
    for tag in (
        "base_model", "base_model_revision", "method", "recipe_digest", "image", "gate",
        "report_digest", "model_digest", "merge_max_logit_diff", "tuned_exact_match",
        "train_data_digest", "eval_set_digest", "package_digest",
    ):  # fmt: skip
        assert f"tuneline.{tag}" in found.tags, tag
    info = mlflow.models.get_model_info(f"models:/origin/{version}")
    assert info.signature is not None and info.signature.inputs is not None
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert logged.source_run_id == found.run_id and str(logged.status) == "READY"
    pinned = mlflow.artifacts.load_text(f"models:/origin/{version}/requirements.txt")
    assert "transformers==" in pinned and "torch==" in pinned
    example = mlflow.artifacts.load_dict(f"models:/origin/{version}/serving_input_example.json")
    assert example == {"inputs": ["apple number 3 is red"]}


@pytest.mark.parametrize("dies_before", ["upload of the third file", "finalize", "version"])
def test_a_registration_that_died_is_taken_up_without_an_orphan(
    client: Any, make_candidate: Make, monkeypatch: pytest.MonkeyPatch, dies_before: str
) -> None:
    from mlflow import MlflowClient

    name = f"died-{dies_before.split()[0]}"
    model, report = make_candidate(name)
    uploads: list[str] = []
    upload = MlflowClient.log_model_artifact

    def counted(self: Any, model_id: str, path: str, folder: str | None = None) -> None:
        if dies_before.startswith("upload") and len(uploads) == 2:
            raise KeyboardInterrupt
        uploads.append(f"{folder}/{Path(path).name}")
        upload(self, model_id, path, folder)

    def dead(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifact", counted)
        if dies_before == "finalize":
            patch.setattr(MlflowClient, "finalize_logged_model", dead)
        if dies_before == "version":
            patch.setattr(MlflowClient, "create_model_version", dead)
        with pytest.raises(KeyboardInterrupt):
            register(model, report, name, "run", Untracked())
    first, uploads = list(uploads), uploads[:0]
    with monkeypatch.context() as patch:
        dies_before = ""
        patch.setattr(MlflowClient, "log_model_artifact", counted)
        assert register(model, report, name, "run", Untracked()) == 1
    assert not set(first) & set(uploads) and "model/model.safetensors" in first
    assert len(client.search_logged_models(["0"], filter_string=f"name = '{name}'")) == 1
    assert promote(name, Request(1, "me")).alias == "champion"


def test_a_slow_and_lossy_tls_connection_makes_nothing_twice(
    client: Any,
    server: Any,
    certificate: tuple[Path, Path],
    make_candidate: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with proxy(server.uri, certificate) as between:
        uri = f"https://127.0.0.1:{between.port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(RegistryError, match="certificate verify failed"):
            register(*make_candidate("tls"), "tls", "run", Untracked())
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate[0]))
        between.refuse = 3
        between.lose = [b"/model-versions/create", b"/logged-models "]
        assert register(*make_candidate("tls"), "tls", "run", Untracked()) == 1
        assert between.refuse == 0 and between.lost >= 1
        between.lose = [b"/model-versions/create", b"/registered-models/alias"]
        between.lost = 0
        assert promote("tls", Request(1, "me")).alias == "champion"
        assert between.lost == 2
        told = events("tls")
    mlflow.set_tracking_uri(server.uri)
    assert [(e.number, e.action) for e in told] == [(1, "promote")]
    assert len(client.search_model_versions("name = 'tls'")) == 1
    assert client.get_registered_model("tls").aliases["champion"] == "1"


def test_a_server_that_goes_away_leaves_the_registry_as_it_was(
    client: Any, server: Any, make_candidate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    register(*make_candidate("away"), "away", "", Untracked())
    with proxy(server.uri) as between:
        uri = f"http://127.0.0.1:{between.port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        between.lose = [b"/model-versions/get-download-uri"] * 2
        with pytest.raises(RegistryError, match=rf"MLflow at {uri}: promoting away version 1: "):
            promote("away", Request(1, "me"))
    with pytest.raises(RegistryError, match=rf"MLflow at {uri}: connecting: "):
        promote("away", Request(1, "me"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert events("away") == []
    assert "champion" not in client.get_registered_model("away").aliases
    assert promote("away", Request(1, "me")).alias == "champion"


def test_wrong_credentials_and_deleted_files_are_said(
    client: Any, server: Any, object_store: Any, make_candidate: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import boto3

    register(*make_candidate("gone"), "gone", "", Untracked())
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-one")
        with pytest.raises(RegistryError, match="refused the credentials") as caught:
            promote("gone", Request(1, "me"))
        assert "wrong-one" not in str(caught.value) and server.password not in str(caught.value)
    bucket = boto3.resource(
        "s3", endpoint_url=object_store.endpoint, aws_access_key_id=object_store.key,
        aws_secret_access_key=object_store.secret, region_name="us-east-1",
    ).Bucket("mlflow")  # fmt: skip
    prefix = client.get_model_version("gone", "1").source.removeprefix("mlflow-artifacts:/")
    keys = [entry.key for entry in bucket.objects.filter(Prefix=f"artifacts/{prefix}")]
    assert len(keys) > 15
    bucket.delete_objects(
        Delete={"Objects": [{"Key": key} for key in keys if key.endswith("model.safetensors")]}
    )
    with pytest.raises(RegistryError, match=r"model\.safetensors is missing"):
        promote("gone", Request(1, "me"))
    bucket.delete_objects(Delete={"Objects": [{"Key": key} for key in keys]})
    with pytest.raises(RegistryError, match=r"has no files at .* deleted"):
        promote("gone", Request(1, "me"))
    assert events("gone") == []


def test_no_secret_is_in_what_mlflow_keeps_or_the_commands_print(
    client: Any, server: Any, object_store: Any, make_candidate: Make, tmp_path: Path
) -> None:
    model, report = make_candidate("secret")
    with_login = server.uri.replace("://", f"://{server.username}:{server.password}@")
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": with_login,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    told = ""
    for command in (
        ["register", "--model", str(model), "--report", str(report), "--name", "secret"],
        ["promote", "secret", "--version", "1"],
        ["promote", "secret", "--version", "9"],
        ["history", "secret", "--json"],
        ["models"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tuneline_pipelines.cli", *command],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == (1 if "9" in command else 0), done.stderr
        told += done.stdout + done.stderr
    with tracked("run-secret", "register", experiment="secret") as step:
        register(model, report, "secret", "run-secret", step)
    kept = [
        [v.to_dictionary() if hasattr(v, "to_dictionary") else dict(v) for v in found]
        for found in (
            client.search_model_versions("name = 'secret'"),
            client.search_model_versions("name = 'secret.history'"),
            client.search_registered_models(),
            client.search_runs([e.experiment_id for e in client.search_experiments()]),
        )
    ]
    told += json.dumps(kept, default=str)
    assert "tuneline.model_digest" in told
    for secret in (server.password, object_store.key, object_store.secret):
        assert secret not in told


def test_a_tag_set_in_mlflow_approves_through_a_signed_webhook(
    client: Any, make_candidate: Make
) -> None:
    from mlflow.entities.webhook import WebhookEvent

    name, secret = "waits", "a-secret-of-the-webhook"
    register(*make_candidate("waits"), name, "", Untracked(), require_approval=True)
    assert "waits for an approval" in promote(name, Request(1, "me")).reason
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneline_pipelines.cli", "approval-webhook", "--port", "0"],
        env={
            **os.environ,
            "TUNELINE_WEBHOOK_SECRET": secret,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    patience = threading.Timer(120, process.kill)  # ends the waiting for a line
    patience.start()
    with process.stdout as output:
        try:
            url = next(line for line in output if "http://" in line).split()[-1]
            client.create_webhook(
                "approvals", url, [WebhookEvent("model_version_tag", "set")], secret=secret
            )
            unsigned = urllib.request.Request(url, data=b"{}", method="POST")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(unsigned, timeout=10)
            time.sleep(2)  # longer than MLflow remembers that there was no webhook
            client.set_model_version_tag(name, "1", "tuneline.approve", "Ada Vega: read the report")
            next(line for line in output if "is approved by Ada Vega" in line)
        finally:
            patience.cancel()
            process.terminate()
            assert process.wait(20) == 143
    (approval,) = (event for event in events(name) if event.action == "approve")
    assert (approval.by, approval.version) == ("Ada Vega", 1)
    assert promote(name, Request(1, "me")).alias == "champion"
