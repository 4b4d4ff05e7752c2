"""Runs on KFP: followed to their end, why they failed, and their logs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline_pipelines import packages, runs
from tuneline_pipelines.cli import main


def test_a_run_is_followed_to_its_end(endpoint: Any, write_package: Callable[..., Path]) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING", "RUNNING", "SUCCEEDED"])
    lines: list[str] = []
    done = runs.wait(endpoint.connect(), run.run_id, package.steps, lines.append)
    assert done.state == "SUCCEEDED"
    assert [line.split()[1:] for line in lines][-1] == ["say", "succeeded"]
    assert len(lines) == len(set(lines))


def test_a_step_that_waits_for_a_node_is_told_of(
    api: Any, endpoint: Any, write_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    del api  # a real cluster decides itself how long a pod waits
    monkeypatch.setattr(runs, "PENDING_SECONDS", 0)
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED"])
    lines: list[str] = []
    runs.wait(endpoint.connect(), run.run_id, package.steps, lines.append)
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "pending", "pending for 0:00", "running (was pending for 0:00)", "succeeded",
    ]  # fmt: skip


def test_a_failed_run_tells_the_step_and_its_last_words(
    endpoint: Any, write_package: Callable[..., Path]
) -> None:
    package, run = endpoint.submit(write_package(), word="fail")
    endpoint.go(
        run.run_id, package, ["RUNNING", "FAILED"], log="a\nerror: the word was fail\n- x\n"
    )
    connection = endpoint.connect()
    done = runs.wait(connection, run.run_id, package.steps, lambda _: None)
    assert done.state == "FAILED"
    sentence = runs.failure_of(connection, done, package.steps)
    assert f"({run.run_id}) failed in step say: the word was fail" in sentence
    assert f"tuneline logs {run.run_id} --step say" in sentence


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_waiting_ends_with_the_runs_own_result(
    endpoint: Any,
    api: Any,
    write_package: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    end: str,
    code: int,
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(
        run.run_id,
        package,
        ["PENDING", "PENDING", "RUNNING", end],
        log="a\nerror: 2 faults\n- out of cheese\n- x\ny\n",
    )
    assert main(["wait", run.run_id]) == code
    printed = capsys.readouterr()
    assert [line.split()[2] for line in printed.out.splitlines() if " say " in line] == [
        "pending", "running", end.lower(),
    ]  # fmt: skip
    if end == "SUCCEEDED":
        assert printed.out.splitlines()[-1] == f"run {run.display_name} succeeded"
    else:
        expected = {
            "FAILED": "failed in step say: 2 faults\n  - out of cheese\n  - x\n(its log: ",
            "CANCELED": "was stopped",
        }
        assert expected[end] in printed.err


def test_a_step_that_could_not_start_is_named(
    endpoint: Any,
    api: Any,
    write_package: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING", "FAILED"])
    _, details = api.courses[run.run_id].moments[1]
    states = {"say": "RUNTIME_STATE_UNSPECIFIED", "say-driver": "FAILED"}
    for detail in details:
        detail["state"] = states.get(detail["display_name"], detail["state"])
    assert main(["wait", run.run_id]) == 1
    error = capsys.readouterr().err
    assert "could not start step say: KFP's driver refused what it asks for" in error
    assert f"pipeline/runid={run.run_id}" in error


def test_pods_are_named_as_kfp_names_their_templates(packages_folder: Path) -> None:
    steps = packages.read(packages_folder / "finetune-lora.yaml").steps
    assert steps["check-recipe"].template == "retry-system-container-impl"
    # one pod label, for the queue
    assert steps["finetune-lora"].template == "metadata-0-1-retry-system-container-impl"
    assert steps["finetune-lora"].attempts == 31
    inside = packages.read(packages_folder / "retrain.yaml").steps
    assert {"check-retrain", "finetune-chosen", "promote"} <= set(inside)


def test_submit_waits_where_it_is_asked_to(
    endpoint: Any,
    api: Any,
    packages_folder: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = packages.read(packages_folder / "finetune-lora.yaml")
    answer = api.answer

    def started(method: str, path: str, *rest: Any, **keywords: Any) -> Any:
        made = answer(method, path, *rest, **keywords)
        if (method, path) == ("POST", "/apis/v2beta1/runs"):
            endpoint.go(made["run_id"], package, ["RUNNING", "SUCCEEDED"], step="check-recipe")
        return made

    api.answer = started
    arguments = ["submit", str(recipe_file), "--wait", "--package"]
    assert main([*arguments, str(packages_folder / "finetune-lora.yaml")]) == 0
    *_, running, succeeded, end = capsys.readouterr().out.splitlines()
    assert running.split()[1:] == ["check-recipe", "running"]
    assert succeeded.split()[1:] == ["check-recipe", "succeeded"]
    assert end.endswith("succeeded")


def test_waiting_outlasts_a_server_that_restarts(
    endpoint: Any, api: Any, write_package: Callable[..., Path]
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING", "SUCCEEDED"])
    api.fail("GET", "/runs/", status=503, times=6)
    api.fail("GET", "/runs/", drop=True, times=6)
    lines: list[str] = []
    done = runs.wait(endpoint.connect(), run.run_id, package.steps, lines.append)
    assert done.state == "SUCCEEDED"
    assert sum("the run goes on, asking again" in line for line in lines) == 1


def test_waiting_gives_up_after_its_patience_and_says_that_the_run_goes_on(
    endpoint: Any,
    api: Any,
    write_package: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING"])
    monkeypatch.setattr(runs, "PATIENCE_SECONDS", 0.05)
    reading = api.answer

    def away_after_the_first(method: str, path: str, *rest: Any, **keywords: Any) -> Any:
        if path.endswith(run.run_id) and not api.faults:
            api.fail("GET", f"/runs/{run.run_id}", status=503, times=10_000)
        return reading(method, path, *rest, **keywords)

    api.answer = away_after_the_first
    assert main(["wait", run.run_id]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no healthy upstream (503)" in error
    assert f"run {run.run_id} goes on; `tuneline wait {run.run_id}` waits for it" in error


def test_an_interrupted_wait_says_that_the_run_goes_on(
    endpoint: Any, api: Any, write_package: Callable[..., Path]
) -> None:
    _, run = endpoint.submit(write_package(), word="hello")
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneline_pipelines.cli", "wait", run.run_id],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KFP_HOST": api.host},
        # a shell's background jobs, and what they start, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = f"/runs/{run.run_id}$"
    while api.count("GET", path) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"run {run.run_id} goes on; `tuneline wait {run.run_id}` waits for it" in error


def test_logs_are_those_of_the_last_attempt(
    endpoint: Any,
    api: Any,
    write_package: Callable[..., Path],
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING"], log="first\n")
    assert main(["logs", run.run_id, "--step", "say"]) == 0
    assert capsysbinary.readouterr().out == b"first\n"
    endpoint.go(run.run_id, package, ["RUNNING"], log="second\n", attempt=1)
    assert main(["logs", run.run_id]) == 0
    assert capsysbinary.readouterr().out == b"second\n"


def test_a_log_that_is_not_there_gives_the_command_for_the_cluster(
    endpoint: Any,
    api: Any,
    write_package: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, run = endpoint.submit(write_package(), word="hello")
    endpoint.go(run.run_id, package, ["RUNNING"])
    assert main(["logs", run.run_id, "--step", "say"]) == 1
    assert f"kubectl logs --namespace kubeflow --selector pipeline/runid={run.run_id}" in (
        capsys.readouterr().err
    )
    assert main(["logs", run.run_id, "--step", "sya"]) == 2
    assert "it has say. Did you mean 'say'?" in capsys.readouterr().err
    assert main(["logs", "absent"]) == 2
    assert "there is no run 'absent'" in capsys.readouterr().err


def test_the_newest_runs_are_listed_first(
    endpoint: Any, write_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if endpoint.api:
        endpoint.api.largest_page = 2
    path = write_package()
    names = [endpoint.submit(path, word=word)[1].display_name for word in "abcd"]
    assert main(["runs", "--limit", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    if endpoint.api:  # elsewhere others submit too
        assert [row["name"] for row in rows] == names[:0:-1]
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["run", "name", "state"]
    with pytest.raises(SystemExit):
        main(["runs", "--limit", "0"])
