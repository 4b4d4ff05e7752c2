"""The command line: light, and clear about what is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tuneline_pipelines.cli import main

HEAVY = ("torch", "transformers", "peft", "mlflow", "datasets", "bitsandbytes")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--out", "{out}"], ["schema"], ["methods"]]
)
def test_help_and_compiling_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tuneline_pipelines.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(a.format(out=tmp_path) for a in arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_without_a_container_engine_no_step_starts(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "examples/demo.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", "run", str(demo), "--image", "an-image:1",
         "--workdir", str(tmp_path / "work")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
             "DOCKER_HOST": f"unix://{tmp_path}/absent.sock"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert "no container engine answers, which --image an-image:1 needs" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["run.log"]


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "absent.yaml"], 2, "absent.yaml: 1 fault"),
        (["run", "{demo}", "--set", "method.name=qlorra"], 2, "method 'qlorra' is unknown"),
        (["run", "{demo}", "--set", "training.epoch=2"], 2, "Did you mean 'epochs'?"),
        (["run", "{demo}", "--workdir", "/dev/null/x"], 1, "work folder /dev/null/x"),
        (["prepare", "--base-model", "absent", "--data", "x", "--output", "o"], 1, "no folder"),
        (
            ["finetune", "--base-model", "{tiny}", "--data", "absent", "--method", "lora",
             "--output", "o"], 1, "absent is not a finished prepared_dataset",
        ),
        (
            ["finetune", "--base-model", "{tiny}", "--data", "absent", "--method", "lorra",
             "--output", "o"], 2, "Did you mean 'lora'?",
        ),
        (
            ["finetune", "--base-model", "{tiny}", "--data", "absent", "--method", "lora",
             "--set", "rnak=4", "--output", "o"], 2, "Did you mean 'rank'?",
        ),
        (["promote", "m", "--version", "1"], 1, "set MLFLOW_TRACKING_URI"),
        (
            ["promote", "m", "--version", "1", "--tracking-uri", "foo://x"], 1,
            "MLflow at foo://x: connecting",
        ),
        (
            ["promote", "m", "--version", "1", "--tracking-uri", "sqlite:///{tiny}/config.json"], 1,
            "file is not a database",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_and_an_exit_code(
    arguments: list[str],
    code: int,
    sentence: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Path(__file__).parents[2] / "examples" / "demo.yaml"
    assert main([a.format(demo=demo, tiny=tiny_model) for a in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prepare"])
    assert caught.value.code == 2 and "--base-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_killed_step_leaves_no_artifact_and_a_rerun_works(
    number: signal.Signals, code: int, tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    data, adapter = tmp_path / "data", tmp_path / "adapter"
    base = ["--base-model", str(tiny_model)]
    assert main(["prepare", *base, "--data", str(chats_file), "--output", str(data)]) == 0
    command = ["finetune", *base, "--data", str(data), "--method", "lora", "--output", str(adapter)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneline_pipelines.cli", *command, "--set", "epochs=100000"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        next(line for line in output if "step 1/" in line or "loss" in line)
        process.send_signal(number)
    assert process.wait(60) == code
    assert not adapter.exists()
    assert main([*command, "--set", "epochs=0.2"]) == 0
    # the stopped run's checkpoints wait for the same command; another one does not touch them
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")
    assert left == ["adapter", "adapter.checkpoints", "data"]
    written = list((tmp_path / "adapter.checkpoints").glob("*/step-*"))
    assert len(written) == (1 if number == signal.SIGTERM else 0)
