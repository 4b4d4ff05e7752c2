"""Submitting runs to KFP: one run for one request, of what the recipe says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline_pipelines import client, packages, runs
from tuneline_pipelines.cli import main


def test_the_newest_version_runs_with_the_recipes_parameters(
    endpoint: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = endpoint.connect()
    lora = packages.read(packages_folder / "finetune-lora.yaml")
    list(client.publish(connection, [lora]))
    capsys.readouterr()
    assert main(["submit", str(recipe_file), "--set", "method.rank=4"]) == 0
    run = _run_of(endpoint, capsys)
    assert run.display_name.startswith(f"{recipe_file.stem} ")
    found = client.published(connection, "finetune-lora")
    assert found is not None
    assert run.pipeline_version_reference.pipeline_version_id == found.version_id
    parameters = run.runtime_config.parameters
    assert parameters["rank"] == 4
    assert parameters["base_model"] == "demo"
    assert set(parameters) <= set(found.package.inputs)
    # KFP's MLflow plugin reads no parameter, and would take an experiment of its own
    assert run.plugins_input == {"mlflow": {"experiment_name": parameters["experiment"]}}


def test_faults_of_a_recipe_are_found_before_the_server_is_asked(
    api: Any, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe_file), "--set", "training.epoch=2"]) == 2
    assert "Did you mean 'epochs'?" in capsys.readouterr().err
    assert not api.requests


@pytest.mark.parametrize(
    ("pipeline", "further", "expected"),
    [
        ("retrain", ["--pool", "cpu"], {"method": "lora", "gpu_pool": "cpu"}),
        ("compare", ["--methods", "lora, bitfit"], {"methods": ["lora", "bitfit"]}),
        ("compare", [], {"methods": ["all"]}),
    ],
)
def test_the_other_pipelines_take_a_recipe_too(
    endpoint: Any,
    packages_folder: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    pipeline: str,
    further: list[str],
    expected: dict[str, Any],
) -> None:
    package = str(packages_folder / f"{pipeline}.yaml")
    arguments = ["submit", str(recipe_file), "--pipeline", pipeline, "--package", package]
    assert main([*arguments, *further]) == 0
    parameters = _run_of(endpoint, capsys).runtime_config.parameters
    assert expected.items() <= parameters.items()
    assert parameters["overrides"]["gate"]["min_gain"] == 0.3


def test_with_several_users_all_is_in_the_namespace(
    api: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.multi_user = True
    submit = ["submit", str(recipe_file), "--package", str(packages_folder / "finetune-lora.yaml")]
    assert main([*submit, "--namespace", "team-a"]) == 0
    assert main([*submit, "--namespace", "team-b"]) == 0
    assert sorted(e["namespace"] for e in api.experiments.values()) == ["team-a", "team-b"]
    capsys.readouterr()
    assert main(["runs", "--namespace", "team-a", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main(["schedule", "list", "--namespace", "team-a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_experiment_of_any_name_is_made_once(
    endpoint: Any, api: Any, packages_folder: Path, recipe_file: Path
) -> None:
    name = '50% more + \u00e9t\u00e9 & "co"'
    arguments = ["submit", str(recipe_file), "--experiment", name]
    for _ in range(2):
        assert main([*arguments, "--package", str(packages_folder / "finetune-lora.yaml")]) == 0
    assert [one["display_name"] for one in api.experiments.values()] == [name]
    assert len(api.runs) == 2


def test_what_is_not_published_is_compiled_and_sent_with_the_run(
    endpoint: Any, api: Any, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", str(recipe_file), "--method", "bitfit"]
    drop = yaml.safe_load(recipe_file.read_text())
    drop["method"] = {"missing_biases": "add"}
    recipe_file.write_text(yaml.safe_dump(drop))
    assert main(arguments) == 0
    run = _run_of(endpoint, capsys)
    held = packages.of(run.pipeline_spec)
    assert held is not None and held.name == "finetune-bitfit"
    assert held.platform["platforms"]["kubernetes"]
    assert run.runtime_config.parameters["missing_biases"] == "add"
    assert not api.pipelines


def test_a_package_file_goes_with_its_run(
    endpoint: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = packages_folder / "finetune-lora.yaml"
    assert main(["submit", str(recipe_file), "--package", str(package)]) == 0
    run = _run_of(endpoint, capsys)
    assert packages.of(run.pipeline_spec) == packages.read(package)


@pytest.mark.parametrize(
    "fault",
    [
        {"drop": True, "after": True},
        {"status": 502, "after": True},
        {"drop": True},
        {"status": 500, "after": True},
        {"status": 503},
        {"status": 429},
    ],
)
def test_a_lost_answer_while_submitting_makes_one_run(
    endpoint: Any,
    api: Any,
    packages_folder: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
) -> None:
    api.fail("POST", "/runs$", **fault)
    package = packages_folder / "finetune-lora.yaml"
    assert main(["submit", str(recipe_file), "--package", str(package)]) == 0
    assert len(api.runs) == 1
    assert _run_of(endpoint, capsys).run_id in api.runs


def test_a_submission_that_stays_unclear_says_where_to_look(
    api: Any,
    packages_folder: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    api.fail("POST", "/runs$", drop=True, times=10)
    package = packages_folder / "finetune-lora.yaml"
    assert main(["submit", str(recipe_file), "--package", str(package)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"it may have been done all the same: look for '{recipe_file.stem} " in error
    assert "was lost (Remote end closed connection without response)" in error


def test_what_kfp_itself_calls_an_error_is_not_sent_again(
    api: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.fail("POST", "/runs$", status=500)
    package = packages_folder / "finetune-lora.yaml"
    assert main(["submit", str(recipe_file), "--package", str(package)]) == 1
    assert api.count("POST", "/runs$") == 1
    assert "it may have been done all the same" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_comes_late_is_stopped(
    endpoint: Any, api: Any, write_package: Callable[..., Path]
) -> None:
    """The server carries the first request out after the second one was sent."""
    package = packages.read(write_package())
    api.fail("POST", "/runs$", status=504, after=True)
    connection = endpoint.connect()
    submission = client.Submission(f"{endpoint.prefix} late", package, {}, endpoint.prefix)
    hidden: list[dict[str, Any]] = []
    answer = api.answer

    def slow(method: str, path: str, *rest: Any, **keywords: Any) -> Any:
        made = answer(method, path, *rest, **keywords)
        if (method, path) == ("POST", "/apis/v2beta1/runs") and not hidden:
            hidden.append(api.runs.pop(made["run_id"]))
        elif (method, path) == ("POST", "/apis/v2beta1/runs"):
            api.runs[hidden[0]["run_id"]] = hidden[0]
        return made

    api.answer = slow
    run, made = client.submit(connection, submission)
    assert made and run.run_id == hidden[0]["run_id"]
    states = sorted(held["state"] for held in api.runs.values())
    assert states == ["CANCELED", "PENDING"]
    assert api.runs[run.run_id]["state"] == "PENDING"


def test_one_submission_id_submits_once(
    endpoint: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "submit", str(recipe_file), "--package", str(packages_folder / "finetune-lora.yaml"),
        "--submission-id", "ci-17",
    ]  # fmt: skip
    assert main(arguments) == 0
    first = _run_of(endpoint, capsys)
    assert main(arguments) == 0
    assert _run_of(endpoint, capsys).run_id == first.run_id
    assert main([*arguments, "--set", "method.rank=2"]) == 2
    assert f"'{recipe_file.stem} ci-17' already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pool", "a100"], "gpu_pool: 'a100' is not offered by finetune-lora, which takes gpu"),
        (["--methods", "lora"], "belongs to --pipeline compare"),
        (["--pipeline", "compare", "--method", "lora"], "use --methods"),
        (["--pipeline", "compare", "--methods", "lora"], "finetune-lora has no parameter"),
        (["--package", "absent.yaml"], "absent.yaml can't be read"),
        (["--pipeline", "compare", "--methods", "lorra"], "method 'lorra' is unknown"),
        (["--version", "1"], "pipeline 'finetune-lora' is not published; there are none"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_one_sentence(
    api: Any,
    packages_folder: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    if "--version" not in arguments and "--package" not in arguments:
        arguments = [*arguments, "--package", str(packages_folder / "finetune-lora.yaml")]
    assert main(["submit", str(recipe_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) <= 2
    assert not api.runs


def test_values_that_a_pipeline_does_not_offer_are_refused() -> None:
    inputs = {
        "gpu_pool": {"parameterType": "STRING", "defaultValue": "l4", "literals": ["l4", "a100"]},
        "data": {"parameterType": "STRING"},
    }
    package = packages.Package(
        {
            "pipelineInfo": {"name": "p"},
            "root": {"inputDefinitions": {"parameters": inputs}, "dag": {"tasks": {}}},
        },
        {},
    )
    assert client.arguments_of(package, None, pool="a100", further={"data": "x"}) == {
        "gpu_pool": "a100",
        "data": "x",
    }
    with pytest.raises(Exception, match=r"'a10' is not offered by p, which takes l4, a100.*a100"):
        client.arguments_of(package, None, pool="a10", further={"data": "x"})
    with pytest.raises(Exception, match="p needs the parameter data"):
        client.arguments_of(package, None, pool=None)
    with pytest.raises(Exception, match=r"p has no parameter dta; .* Did you mean 'data'"):
        client.arguments_of(package, None, pool=None, further={"dta": "x"})


def _run_of(endpoint: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["page"] == f"{endpoint.host}/#/runs/details/{lines['run']}"
    return runs.get_run(endpoint.connect(), lines["run"])


def test_a_version_is_promoted_by_a_run(
    endpoint: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = ["submit", str(recipe_file), "--pipeline", "promote"]
    assert main(submit) == 2
    assert "name it with --model-version N" in capsys.readouterr().err
    assert main(["submit", str(recipe_file), "--model-version", "3"]) == 2
    assert "belongs to --pipeline promote" in capsys.readouterr().err
    package = str(packages_folder / "promote.yaml")
    settings = ["--set", "registry.to_model=production.orders"]
    assert main([*submit, "--package", package, "--model-version", "3", *settings]) == 0
    registry = yaml.safe_load(recipe_file.read_text())["registry"]
    assert _run_of(endpoint, capsys).runtime_config.parameters == {
        "model_name": registry["model_name"],
        "version": 3,
        "copy_to_model": "production.orders",
        "experiment": registry["experiment"],
    }


def test_another_method_leaves_out_what_it_has_not(
    endpoint: Any, packages_folder: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    values["method"] = {"name": "lora", "rank": 4, "use_dora": True, "target_modules": ["q_proj"]}
    recipe_file.write_text(yaml.safe_dump(values))
    package = str(packages_folder / "finetune-ia3.yaml")
    submit = ["submit", str(recipe_file), "--method", "ia3", "--package", package]
    assert main(submit) == 0
    said = capsys.readouterr().err
    assert "ia3 has no rank, target_modules, use_dora: left out of the recipe's method" in said
    assert main([*submit, "--set", "method.rank=4"]) == 2  # said for this method itself
    assert "method.rank: unknown key" in capsys.readouterr().err
    values["method"]["rnak"] = 4
    recipe_file.write_text(yaml.safe_dump(values))
    assert main(submit) == 2
    assert "method.rnak: unknown key" in capsys.readouterr().err
    del endpoint


def test_images_without_a_digest_are_told_of(
    api: Any, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "images.lock"
    digest = "sha256:" + "1" * 64
    lock.write_text(f"cpu: registry.example.org/cpu@{digest}\ngpu: registry.example.org/gpu:1\n")
    command = [sys.executable, "-m", "tuneline_pipelines.cli"]
    # a process of its own: a component reads its image when it is imported
    done = subprocess.run(
        [*command, "submit", str(recipe_file), "--images", str(lock)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "warning: registry.example.org/gpu:1 can be other content tomorrow" in done.stderr
    (made,) = api.runs.values()
    assert f"registry.example.org/cpu@{digest}" in json.dumps(made["pipeline_spec"])
    done = subprocess.run(
        [*command, "publish", "--images", str(lock), "--release"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 2 and "registry.example.org/gpu:1 has no digest" in done.stderr
    assert not api.pipelines


def test_a_release_of_compiled_packages_is_refused_too(
    api: Any, packages_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", "--packages", str(packages_folder), "--release"]) == 2
    assert "- finetune-lora: tuneline-cpu:" in capsys.readouterr().err
    assert not api.pipelines
