"""Schedules: the cluster becomes equal to the file, and nothing else is touched."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline_pipelines import client, packages, schedules
from tuneline_pipelines.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(endpoint: Any, write_package: Callable[..., Path]) -> packages.Package:
    """A published pipeline of one parameter."""
    package = packages.read(write_package())
    list(client.publish(endpoint.connect(), [package]))
    return package


@pytest.fixture
def write_schedules(tmp_path: Path, endpoint: Any, say: packages.Package) -> Callable[..., Path]:
    """Writes a file with schedules of the pipeline, named after the test; group and all."""

    def write(*rows: dict[str, Any], **top: Any) -> Path:
        path = tmp_path / "schedules.yaml"
        common = {"cron": "0 0 3 * * 1", "pipeline": say.name}
        every = [{**common, **row, "name": f"{endpoint.prefix}-{row['name']}"} for row in rows]
        top = {"group": endpoint.prefix, "experiment": endpoint.prefix, **top}
        path.write_text(yaml.safe_dump({**top, "schedules": every}))
        return path

    return write


@pytest.fixture
def there(endpoint: Any) -> Callable[[], dict[str, Any]]:
    """The schedules of this test, by the last part of their names."""

    def read() -> dict[str, Any]:
        found = [
            one
            for one in schedules.present(endpoint.connect())
            if one.display_name.startswith(endpoint.prefix)
        ]
        named = {one.display_name.removeprefix(f"{endpoint.prefix}-"): one for one in found}
        assert len(named) == len(found)
        return named

    return read


def test_a_file_is_applied_and_then_nothing_is_left_to_do(
    endpoint: Any,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(
        write_schedules(
            {"name": "a", "parameters": {"word": "x"}},
            {"name": "b", "cron": "0 */30 * * * *", "enabled": False},
        )
    )
    assert main(["schedule", "diff", file]) == 0
    assert _actions(capsys) == ["create", "create"]
    assert main(["schedule", "diff", file, "--exit-code"]) == 3
    assert not there()
    assert main(["schedule", "apply", file]) == 0
    made = there()
    assert set(made) == {"a", "b"}
    assert made["a"].trigger.cron_schedule.cron == "0 0 3 * * 1"
    assert made["a"].runtime_config.parameters == {"word": "x"}
    assert made["a"].no_catchup is True
    assert made["a"].max_concurrency == "1"
    assert (schedules.is_enabled(made["a"]), schedules.is_enabled(made["b"])) == (True, False)
    capsys.readouterr()
    assert main(["schedule", "apply", file]) == 0
    assert _actions(capsys) == ["unchanged", "unchanged"]
    assert main(["schedule", "diff", file, "--exit-code"]) == 0
    assert {n: r.recurring_run_id for n, r in there().items()} == {
        name: one.recurring_run_id for name, one in made.items()
    }


def test_what_differs_is_made_again_and_what_is_not_in_the_file_removed(
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}, {"name": "b"}))]) == 0
    before = there()
    file = str(write_schedules({"name": "a", "cron": "0 0 4 * * 1", "parameters": {"word": "y"}}))
    capsys.readouterr()
    assert main(["schedule", "apply", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("update ") and lines[1].startswith("remove ")
    assert "cron '0 0 3 * * 1' -> '0 0 4 * * 1'; parameters word" in lines[0]
    after = there()
    assert set(after) == {"a"}
    assert after["a"].recurring_run_id != before["a"].recurring_run_id
    assert after["a"].trigger.cron_schedule.cron == "0 0 4 * * 1"
    assert schedules.is_enabled(after["a"])
    assert main(["schedule", "apply", str(write_schedules())]) == 0
    assert not there()


def test_switching_a_schedule_leaves_it_as_it_is(
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}))]) == 0
    made = there()["a"]
    for enabled, action in ((False, "disable"), (True, "enable")):
        capsys.readouterr()
        file = str(write_schedules({"name": "a", "enabled": enabled}))
        assert main(["schedule", "apply", file]) == 0
        assert _actions(capsys) == [action]
        now = there()["a"]
        assert now.recurring_run_id == made.recurring_run_id
        assert schedules.is_enabled(now) is enabled


def test_a_new_version_of_the_pipeline_moves_the_schedules_that_follow_it(
    endpoint: Any,
    say: packages.Package,
    write_package: Callable[..., Path],
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(write_schedules({"name": "a"}, {"name": "b", "version": say.version_name}))
    assert main(["schedule", "apply", file]) == 0
    second = packages.read(write_package(word="later"))
    list(client.publish(endpoint.connect(), [second]))
    capsys.readouterr()
    assert main(["schedule", "apply", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["update", "unchanged"]
    assert f"version -> {second.version_name}" in lines[0]
    newest = client.published(endpoint.connect(), say.name)
    assert newest is not None
    reference = there()["a"].pipeline_version_reference
    assert reference.pipeline_version_id == newest.version_id


def test_schedules_of_others_are_not_touched(
    endpoint: Any,
    say: packages.Package,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import kfp_server_api as kfp

    connection = endpoint.connect()
    found = client.published(connection, say.name)
    assert found is not None
    body = kfp.V2beta1RecurringRun(
        display_name=f"{endpoint.prefix}-theirs",
        description="by hand",
        experiment_id=client.experiment_id(connection, endpoint.prefix),
        pipeline_version_reference=kfp.V2beta1PipelineVersionReference(**found.reference),
        runtime_config=kfp.V2beta1RuntimeConfig(parameters={}),
        trigger=kfp.V2beta1Trigger(cron_schedule=kfp.V2beta1CronSchedule(cron="0 0 1 * * *")),
        max_concurrency="1",
        mode="DISABLE",
    )
    service = connection.recurring_runs
    theirs = connection.call("making", service.recurring_run_service_create_recurring_run, body)
    other = write_schedules({"name": "other"}, group="another-team")
    assert main(["schedule", "apply", str(other)]) == 0
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}))]) == 0
    assert main(["schedule", "apply", str(write_schedules())]) == 0
    assert set(there()) == {"theirs", "other"}
    assert there()["theirs"].recurring_run_id == theirs.recurring_run_id
    capsys.readouterr()
    for name, whose in (("theirs", "somebody by hand"), ("other", "group another-team")):
        assert main(["schedule", "apply", str(write_schedules({"name": name}))]) == 2
        assert f"is there already, made by {whose}" in capsys.readouterr().err
    assert set(there()) == {"theirs", "other"}
    assert main(["schedule", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "(not by tuneline)" in rows[f"{endpoint.prefix}-theirs"]
    assert say.version_name in rows[f"{endpoint.prefix}-other"]


@pytest.mark.parametrize(
    "fault", [{"drop": True, "after": True}, {"status": 503, "after": True}, {"status": 503}]
)
@pytest.mark.parametrize("call", ["POST recurringruns$", "DELETE recurringruns/", "POST :enable$"])
def test_a_lost_answer_leaves_one_schedule(
    api: Any,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    call: str,
    fault: dict[str, Any],
) -> None:
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}))]) == 0
    method, path = call.split()
    api.fail(method, path, **fault)
    file = str(write_schedules({"name": "a", "parameters": {"word": "new"}}))
    assert main(["schedule", "apply", file]) == 0
    assert not api.faults
    assert there()["a"].runtime_config.parameters == {"word": "new"}
    assert schedules.is_enabled(there()["a"])


def test_a_definition_that_the_server_refuses_leaves_the_old_one(
    api: Any,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}))]) == 0
    before = there()["a"]
    file = str(write_schedules({"name": "a", "parameters": {"word": "new"}}))
    api.fail("POST", "recurringruns$", status=400)
    assert main(["schedule", "apply", file]) == 1
    error = capsys.readouterr().err
    assert "making schedule" in error and "no healthy upstream (400)" in error
    assert there()["a"].recurring_run_id == before.recurring_run_id
    assert schedules.is_enabled(there()["a"])


@pytest.mark.parametrize("call", ["DELETE recurringruns/", "POST :enable$"])
def test_an_apply_that_broke_off_is_finished_by_the_next_one(
    api: Any,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    call: str,
) -> None:
    assert main(["schedule", "apply", str(write_schedules({"name": "a"}))]) == 0
    file = str(write_schedules({"name": "a", "parameters": {"word": "new"}}))
    method, path = call.split()
    api.fail(method, path, status=403)
    assert main(["schedule", "apply", file]) == 1
    # whatever is there, at most one of them fires
    assert sum(one["mode"] == "ENABLE" for one in api.recurring.values()) <= 1
    assert main(["schedule", "apply", file]) == 0
    assert there()["a"].runtime_config.parameters == {"word": "new"}
    assert schedules.is_enabled(there()["a"])
    assert main(["schedule", "diff", file, "--exit-code"]) == 0


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"cron": "0 3 * * 1"}, "schedules.0.cron: has five fields"),
        ({"cron": "0 0 25 * * *"}, "the hour '25' is not from 0 to 23"),
        ({"pipeline": "sya"}, "pipeline 'sya' is not published; there are "),
        ({"pipeline": "finetune"}, "name the recipe that it is about"),
        ({"version": "0.0.1"}, "has no version '0.0.1'; the newest are 0."),
        ({"recipe": "absent.yaml"}, "absent.yaml: 1 fault"),
        ({"parameters": {"wrod": "x"}}, "has no parameter wrod; it has word. Did you mean 'word'?"),
        ({"pool": "a100"}, "does not choose between node pools"),
        ({"parameters": {"word": date(2026, 1, 1)}}, "takes what JSON has, a date in quotes"),
        ({"cronn": "x"}, "Did you mean 'cron'?"),
        ({"overrides": {"method": {"rank": 4}}}, "name the recipe that it is about"),
    ],
)
def test_a_fault_in_the_file_changes_nothing(
    endpoint: Any,
    write_schedules: Callable[..., Path],
    there: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    sentence: str,
) -> None:
    file = str(write_schedules({"name": "fine"}, {"name": "a"}))
    assert main(["schedule", "apply", file]) == 0
    capsys.readouterr()
    for command in ("apply", "diff"):
        assert main(["schedule", command, str(write_schedules({"name": "a", **row}))]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert len(error.splitlines()) <= 2
    assert set(there()) == {"fine", "a"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("schedules: [", "is not YAML"),
        ("", "must be a mapping of group, experiment"),
        ("- name: a", "must be a mapping of group, experiment"),
        ("group: a", "schedules: is required"),
        (
            "schedules: [{name: a, cron: '0 0 3 * * 1'}, {name: a, cron: '0 0 4 * * 1'}]",
            "schedules are there twice: a",
        ),
        ("schedules: [{name: 'a b', cron: '0 0 3 * * 1'}]", "schedules.0.name"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_none_is_refused_before_anything_is_asked(
    api: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    sentence: str,
) -> None:
    path = tmp_path / "schedules.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["schedule", "apply", str(path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) <= 2
    assert not api.requests


def test_the_example_is_applied_with_its_recipes(
    endpoint: Any, api: Any, packages_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = [
        packages.read(packages_folder / f"{name}.yaml")
        for name in ("finetune-lora", "retrain", "promote")
    ]
    list(client.publish(endpoint.connect(), needed))
    file = str(ROOT / "examples/schedules.yaml")
    assert main(["schedule", "apply", file]) == 0
    assert set(_actions(capsys)) == {"create"}
    held = {one["display_name"]: one for one in api.recurring.values()}
    monthly = held["orders-monthly"]
    assert monthly["runtime_config"]["parameters"]["rank"] == 32
    assert monthly["mode"] == "DISABLE"
    # KFP 2.17 makes a schedule that has this without its parameters
    assert not any(one.get("plugins_input") for one in held.values())
    nightly = held["orders-nightly"]["runtime_config"]["parameters"]
    assert nightly["method"] == "lora"
    assert nightly["overrides"]["method"]["layers"] == [18, 30]
    assert held["orders-release"]["runtime_config"]["parameters"]["model_name"] == "demo-orders"


def _actions(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]
