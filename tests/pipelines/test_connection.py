"""The connection to KFP: who asks, what is tried again, and what a fault reads like."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneline_pipelines import runs
from tuneline_pipelines.cli import main
from tuneline_pipelines.connection import Connection, Fault


def test_help_loads_neither_kfp_nor_torch() -> None:
    code = (
        "import sys\nfrom tuneline_pipelines.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in ('kfp', 'kfp_server_api', 'torch', 'pydantic') if m in sys.modules])"
    )
    for arguments in (["--help"], ["submit", "--help"], ["schedule", "apply", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"


SECRET = "eyJhbGciOiJSUzI1NiJ9.a-token-that-nobody-may-see"


def test_a_token_is_sent_and_never_shown(
    api: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.token = SECRET
    monkeypatch.setenv("KFP_TOKEN", f"{SECRET}\n")
    assert main(["runs"]) == 0
    api.token = "another"  # the server now quotes the token that it refuses
    assert main(["runs"]) == 1
    api.fail("GET", "/healthz", status=403, message=f"{SECRET} may not list runs")
    assert main(["runs"]) == 1
    api.fail("GET", "/healthz", status=500, times=4)
    monkeypatch.setenv("KFP_HOST", f"{api.host}/{SECRET}")
    assert main(["runs"]) == 1
    printed = capsys.readouterr()
    assert "does not know who asks (401): set KFP_TOKEN" in printed.err
    assert "this login may not ((secret) may not list runs)" in printed.err
    assert SECRET not in printed.out + printed.err


@pytest.mark.parametrize("variable", ["KFP_TOKEN", "KFP_COOKIE"])
@pytest.mark.parametrize("text", [f"{SECRET}\nX-Other: 1", f"{SECRET}\u2019"])
def test_what_fits_into_no_header_is_refused_and_not_shown(
    api: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    text: str,
) -> None:
    monkeypatch.setenv(variable, text)
    assert main(["runs"]) == 2
    error = capsys.readouterr().err
    assert f"{variable} holds something that is no credential" in error
    assert SECRET not in error
    assert not api.requests


def test_a_token_file_is_read_again_when_it_changes(
    endpoint: Any, api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    monkeypatch.setenv("KFP_TOKEN_FILE", str(file))
    api.token = "first"
    connection = endpoint.connect()
    assert runs.newest_runs(connection, 1) == []
    api.token = "second"
    file.write_text("second\n")
    assert runs.newest_runs(connection, 1) == []
    file.unlink()
    with pytest.raises(Fault, match="token"):
        runs.newest_runs(connection, 1)


def test_the_token_that_a_pod_is_given_is_used(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("projected")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    api.token = "projected"
    assert main(["runs"]) == 0


def test_the_token_of_a_pod_goes_to_hosts_of_its_cluster_only(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("projected")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    for host, sent in (
        ("http://ml-pipeline.kubeflow.svc.cluster.local:8888", True),
        ("https://kubeflow.example.org", False),
        ("https://ml-pipeline.svc.example.org", False),
    ):
        keys = Connection(host).client.configuration.api_key
        assert ("authorization" in keys) is sent


def test_a_cookie_identifies_too(
    api: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.cookie = f"authservice_session={SECRET}"
    monkeypatch.setenv("KFP_COOKIE", api.cookie)
    assert main(["runs"]) == 0
    api.fail("GET", "/runs$", status=403)
    assert main(["runs"]) == 1
    printed = capsys.readouterr()
    assert "this login may not (no healthy upstream): ask for access" in printed.err
    assert SECRET not in printed.out + printed.err


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"page": True}, "answered with text/html and not as KFP does, a login page"),
        ({"status": 302, "location": "/dex/auth"}, "does not know who asks (302)"),
        ({"status": 500, "times": 4}, "no healthy upstream (500)"),
    ],
)
def test_answers_that_are_none_are_one_sentence(
    api: Any, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], sentence: str
) -> None:
    api.fail("GET", "/healthz", **fault)
    assert main(["runs"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: reading the server's state: ") and sentence in last


def test_a_server_that_is_not_there_is_one_sentence(
    api: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KFP_HOST", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert main(["runs"]) == 1
    assert "can't be reached (Connection refused)" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("KFP_HOST", api.host.replace("http", "https"))
    assert main(["runs"]) == 1
    assert "can't be trusted" in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_is_another_one_is_told_apart(
    endpoint: Any, api: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = api.answer

    def another(method: str, path: str, *rest: Any, **keywords: Any) -> Any:
        answer(method, path, *rest, **keywords)
        return "ok"

    api.answer = another
    assert main(["runs"]) == 1
    assert f"{endpoint.host} answered with text/plain and not as KFP does" in (
        capsys.readouterr().err
    )


def test_a_lost_answer_to_a_reading_is_asked_for_again(
    api: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    api.fail("GET", "/runs$", drop=True)
    api.fail("GET", "/healthz$", status=503, times=2)
    assert main(["runs"]) == 0
    assert api.count("GET", "/runs$") == 2
    assert capsys.readouterr().err.count("trying again") == 3


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("", "no KFP endpoint: name it with --host or KFP_HOST"),
        ("kubeflow.example.org", "must begin with http:// or https://"),
        (f"https://me:{SECRET}@kubeflow.example.org", "the host has a login in it"),
    ],
)
def test_a_host_that_can_not_be_used_is_refused(
    api: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("KFP_HOST", host)
    assert main(["runs"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and SECRET not in error
