"""Legs of a comparison, their processes, and the leaderboard."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tuneline import artifacts, recipe, steps
from tuneline.compare import leaderboard, watch
from tuneline.compare.leg import FAILED, FINISHED, Job, write_job
from tuneline.compare.legs import leg_of, legs_of
from tuneline.errors import ArtifactError, RecipeError, TrainingError
from tuneline.finetune.methods import METHODS
from tuneline_pipelines import resources

NAMES = [method.name for method in METHODS]


def resolved(**sections: Any) -> recipe.Recipe:
    values = {
        "model": {"base_model": "demo"},
        "data": {"train": "demo:train"},
        "method": {"name": "lora", "rank": 4, "alpha": 8},
        "training": {"learning_rate": 0.5, "epochs": 3, "seed": 7},
        "registry": {"model_name": "m"},
        **sections,
    }
    return recipe.resolve(values, exports=False)


def test_the_recipes_settings_are_those_of_its_own_method_only() -> None:
    legs = {leg.name: leg for leg in legs_of(resolved(), ["all"])}
    assert list(legs) == NAMES
    for method in METHODS:
        leg = legs[method.name]
        own = method.name == "lora"
        assert leg.training.learning_rate == (0.5 if own else method.learning_rate)
        assert leg.training.epochs == 3 and leg.training.seed == 7
        assert leg.settings == method.config_class(**({"rank": 4, "alpha": 8} if own else {}))
        assert leg_of(json.loads(json.dumps(leg.values()))) == leg


def test_the_compare_section_changes_legs_and_adds_some() -> None:
    compare = {
        "bitfit": {"missing_biases": "add", "learning_rate": 0.25},
        "wide": {"method": "lora", "rank": 64},
        "dora": {"method": "lora", "use_dora": True, "learning_rate": 1e-3},
    }
    legs = legs_of(resolved(compare=compare), ["dora", "bitfit", "lora", "wide"])
    assert [leg.name for leg in legs] == ["lora", "bitfit", "wide", "dora"]
    _, bitfit, wide, dora = (leg.values() for leg in legs)
    assert bitfit["method"]["missing_biases"] == "add"
    assert bitfit["training"]["learning_rate"] == 0.25
    assert (wide["method"]["rank"], wide["method"]["alpha"]) == (64, 8)
    assert wide["training"]["learning_rate"] == 0.5
    assert dora["method"]["use_dora"] and dora["training"]["learning_rate"] == 1e-3
    assert len(legs_of(resolved(compare=compare), ["all"])) == len(METHODS) + 2


def test_a_method_that_can_not_be_merged_can_be_the_recipes_own() -> None:
    legs = legs_of(resolved(method={"name": "prompt_tuning", "num_virtual_tokens": 5}), ["all"])
    assert {leg.name: leg for leg in legs}["prompt_tuning"].values()["method"] == {
        "name": "prompt_tuning", "num_virtual_tokens": 5, "init_text": "", "load_in_4bit": False,
    }  # fmt: skip


def test_every_fault_of_every_leg_is_named() -> None:
    compare = {
        "lora": {"rnak": 2},
        "ia3": {"epochs": 2},
        "mine": {"method": "lorra"},
        "bare": {"rank": 2},
        "hot": {"method": "lora", "learning_rate": 11},
    }
    with pytest.raises(RecipeError) as caught:
        legs_of(resolved(compare=compare), ["qlorra", "ia3"])
    text = str(caught.value)
    for sentence in (
        "method 'qlorra' is unknown; compared can be all, full, lora",
        "compare.lora: rnak: unknown key; keys here are rank",
        "compare.ia3: epochs: unknown key",
        "compare.mine: method 'lorra' is unknown",
        "compare.bare: method 'bare' is unknown",
        "compare.hot: learning_rate: input should be less than 10",
    ):
        assert sentence in text
    with pytest.raises(RecipeError, match="no method to compare"):
        legs_of(resolved(), [])


def row(leg: str, score: float, parameters: int, **more: Any) -> dict[str, Any]:
    return {
        "leg": leg, "method": leg.partition("-")[0], "status": FINISHED,
        "settings": {"name": leg.partition("-")[0]}, "base_model": "demo<script>",
        "learning_rate": 1e-3, "metric": "exact_match", "higher_is_better": True, "rows": 50.0,
        "score": score, "interval": [score - 0.1, score + 0.1], "base": 0.1,
        "base_interval": [0.0, 0.2], "gain_interval": [score - 0.2, score], "passed": score > 0.5,
        "trainable_parameters": float(parameters), "trainable_fraction": 1e-3,
        "train_seconds": 61.0, "tokens_per_second": 100.0, "peak_memory_bytes": 2.5e9,
        "adapter_bytes": 4321.0, "forgetting": {"general text": 0.02},
        "eval_set_digest": "sha256:a", **more,
    }  # fmt: skip


LOST = {
    "leg": "full", "method": "full", "settings": {"name": "full"}, "learning_rate": 2e-5,
    "status": FAILED, "reason": "killed <b>twice</b>",
}  # fmt: skip


def test_ties_go_to_fewer_parameters_and_failed_legs_come_last() -> None:
    rows = [LOST, row("lora", 0.5, 900), row("ia3", 0.5, 30), row("bitfit", 0.7, 50)]
    board = leaderboard.rank(rows)
    assert [(r["leg"], r.get("rank")) for r in board["legs"]] == [
        ("bitfit", 1), ("ia3", 2), ("lora", 3), ("full", None),
    ]  # fmt: skip
    lower = [dict(r, higher_is_better=False) for r in rows[1:]]
    assert [r["leg"] for r in leaderboard.rank(lower)["legs"]] == ["ia3", "lora", "bitfit"]


def test_legs_on_other_rows_are_not_ranked() -> None:
    with pytest.raises(ArtifactError, match="differ in eval_set_digest"):
        leaderboard.rank([row("lora", 0.5, 1), row("ia3", 0.6, 1, eval_set_digest="sha256:b")])


def test_nothing_finished_is_no_comparison() -> None:
    board = leaderboard.rank([LOST])
    assert board == {"legs": [LOST]}
    assert leaderboard.table(board) == "failed: full: killed <b>twice</b>"
    with pytest.raises(TrainingError, match="no leg of the comparison finished: full: killed"):
        leaderboard.check_finished(board)
    assert "full failed" in leaderboard.render(board)


def test_a_step_that_ranks_nothing_fails_and_leaves_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no leg of the comparison finished"):
        steps.leaderboard([LOST], str(tmp_path / "board"))
    assert "twice" in (tmp_path / "board" / "leaderboard.html").read_text()


def test_the_table_says_all_of_each_leg() -> None:
    lines = leaderboard.table(leaderboard.rank([LOST, row("lora", 0.6, 1234567)])).splitlines()
    assert lines[0].split()[:3] == ["#", "leg", "score"]
    for text in ("0.600", "0.500 to 0.700", "+0.400 to +0.600", "1,234,567", "0.100%", "1:01",
                 "2.50 GB", "4.3 kB", "+0.020", "passed"):  # fmt: skip
        assert text in lines[2]
    assert "exact_match on 50 rows, higher is better; the base has 0.100" in lines[3]
    assert lines[4] == "failed: full: killed <b>twice</b>"


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows(tmp_path: Path) -> None:
    rows = [row(f"ia3-{n}", 0.5, 10 ** (n + 1)) for n in range(6)]
    made = leaderboard.write(leaderboard.rank([LOST, *rows]), tmp_path / "board")
    html = (made.path / leaderboard.HTML).read_text()
    assert "<b>twice" not in html and "killed &lt;b&gt;twice" in html
    assert "<script" not in html and "demo&lt;script&gt;" in html
    assert not re.search(r"(src|href)=|url\(|@import", html)
    assert html.count("<svg") == 3 and html.count("<circle") == 18
    for value in re.findall(r'\b(?:x|y|cx|cy|x1|y1)="([^"]+)"', html):
        assert -1 < float(value) < 1000


@pytest.mark.parametrize("scores", [[0.0], [0.5, 0.5, 0.5], [0.0, 1.0], [2.31, 2.30, 9.9]])
def test_labels_do_not_lie_on_each_other(scores: list[float]) -> None:
    board = leaderboard.rank([row(f"ia3-{n}", s, 100 + n) for n, s in enumerate(scores)])
    plot = leaderboard.plot(board, "trainable_parameters", "parameters", str)
    heights = sorted(point["label_y"] for point in plot["points"])
    assert all(b - a >= 14 for a, b in pairwise(heights))
    assert all(plot["top"] <= y - 4 <= plot["bottom"] for y in heights)
    assert all(plot["left"] <= p["x"] <= plot["right"] for p in plot["points"])
    assert all(plot["top"] <= p["y"] <= plot["bottom"] for p in plot["points"])
    assert len(plot["y_ticks"]) >= 2


@pytest.fixture(scope="module")
def job(tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A leg that is ready to run, with short training."""
    folder = tmp_path_factory.mktemp("leg")
    base = str(tiny_model)
    steps.prepare_data(base, {"train": [str(chats_file)], "test_fraction": 0.3}, str(folder / "d"))
    steps.measure_base(base, str(folder / "d"), {}, str(folder / "b"))
    (leg,) = legs_of(resolved(training={"epochs": 0.2, "batch_tokens": 512}), ["lora"])
    return Job(
        leg.values(), base, str(folder / "d"), str(folder / "b"), {}, {"min_rows": 20},
        "adapter", "report", "", "", "",
    )  # fmt: skip


def into(job: Job, folder: Path, **changes: Any) -> Job:
    paths = {"adapter": str(folder / "adapter"), "eval_report": str(folder / "report")}
    return replace(job, **paths, **changes)


@pytest.fixture
def finished_row(job: Job, tmp_path: Path) -> dict[str, Any]:
    return watch.run_watched(into(job, tmp_path), {})


def test_a_leg_tells_what_it_took_and_gave(
    job: Job, finished_row: dict[str, Any], tmp_path: Path
) -> None:
    adapter = artifacts.load(tmp_path / "adapter", "adapter")
    report = artifacts.load(tmp_path / "report", "eval_report").read_json("report.json")
    assert finished_row["status"] == FINISHED and finished_row["leg"] == "lora"
    assert finished_row["score"] == report["tuned"] and finished_row["rows"] == report["rows"]
    assert finished_row["gain_interval"] == report["gain_interval"]
    losses = [e["eval_loss"] for e in adapter.read_jsonl("history.jsonl") if "eval_loss" in e]
    assert finished_row["validation_loss"] == losses[-1]
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert finished_row["adapter_bytes"] == weights.stat().st_size
    # two blocks, query 48 -> 48 and value 48 -> 24, rank 4
    assert finished_row["trainable_parameters"] == 2 * 4 * (96 + 72)
    assert finished_row["tokens_per_second"] > 0
    assert 1e8 < finished_row["peak_memory_bytes"] < 4e9
    # the base's scores are those that were measured before, and the ones that evaluating gives
    alone = steps.evaluate(
        job.base_model, str(tmp_path / "adapter"), job.dataset, {}, job.gate, str(tmp_path / "own")
    )
    assert alone == report
    with_base, without = (tmp_path / n / "scores.jsonl" for n in ("report", "own"))
    assert with_base.read_text() == without.read_text()


def test_the_base_is_measured_once_and_its_scores_are_of_the_same_evaluation(
    job: Job, finished_row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneline.evaluate import evaluate as module
    from tuneline.tracking import Untracked

    measured = []
    original = module.measure

    def measure(name: str, *others: Any) -> Any:
        measured.append(name)
        return original(name, *others)

    def evaluate(output: Path, evaluation: recipe.EvaluationSection) -> None:
        module.evaluate(
            job.base_model,
            tmp_path / "adapter",
            Path(job.dataset),
            evaluation,
            recipe.GateSection(),
            output,
            Untracked(),
            base_scores_dir=Path(job.base_scores),
        )

    monkeypatch.setattr(module, "measure", measure)
    evaluate(tmp_path / "again", recipe.EvaluationSection())
    assert measured == ["tuned"]
    with pytest.raises(ArtifactError, match="for another evaluation settings: measure the base"):
        evaluate(tmp_path / "other", recipe.EvaluationSection(max_rows=5))
    assert not (tmp_path / "other").exists()


def test_a_leg_with_a_stated_error_fails_with_it(job: Job, tmp_path: Path) -> None:
    leg = {**job.leg, "name": "bitfit", "method": {"name": "bitfit"}}
    failed = watch.run_watched(into(job, tmp_path, leg=leg), {})
    assert failed["status"] == FAILED and failed["leg"] == "bitfit"
    assert failed["reason"].startswith("LlamaForCausalLM has no bias terms")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("code", "text", "sentence"),
    [
        (
            1,
            "Traceback\n ...\nKeyError: 'x'\n",
            "ended with exit code 1 and no result: Traceback",
        ),
        (-11, "", "ended by signal 11 and no result: it printed no error"),
        (-9, "x", "killed, most likely by the system for lack of memory: lower training.batch_tok"),
    ],
)
def test_a_process_without_a_result_is_explained(code: int, text: str, sentence: str) -> None:
    assert watch._why(code, text).startswith(sentence)


def endless(job: Job, folder: Path) -> Job:
    leg = {**job.leg, "training": {**job.leg["training"], "epochs": 100000}}
    return into(job, folder, leg=leg)


def child_of(parent: psutil.Process) -> psutil.Process:
    for _ in range(600):
        for process in parent.children():
            if "tuneline.compare.leg" in " ".join(process.cmdline()):
                return process
        time.sleep(0.1)
    raise AssertionError("no leg's process came")


def test_a_killed_leg_fails_and_says_why(job: Job, tmp_path: Path) -> None:
    killer = threading.Thread(target=lambda: child_of(psutil.Process()).kill())
    killer.start()
    failed = watch.run_watched(endless(job, tmp_path), {})
    killer.join()
    assert failed["reason"].startswith("killed, most likely by the system for lack of memory")
    assert "lower training.batch_tokens" in failed["reason"]


def test_the_last_retry_reports_the_pods_that_were_lost(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    assert resources.TRAINING_RETRIES >= watch.LOST_ATTEMPTS
    mine = into(job, tmp_path, run_id="run")
    code = (
        "import json, os, signal, sys\nfrom tuneline.compare import watch\n"
        "from tuneline.compare.leg import Job\n"
        "watch._run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "watch.run_watched(Job(**json.load(open(sys.argv[1]))), {})"
    )
    write_job(mine, tmp_path / "job.json")
    for _ in range(watch.LOST_ATTEMPTS):
        command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    failed = watch.run_watched(mine, {})
    assert failed["status"] == FAILED
    assert failed["reason"].startswith("its pod was lost 3 times without a word")
    assert list((tmp_path / "checkpoints" / "legs").iterdir()) == []


def test_sigterm_stops_the_leg_and_does_not_count_as_a_loss(job: Job, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    arguments = {
        "leg": endless(job, tmp_path).leg, "base_model": job.base_model, "dataset": job.dataset,
        "base_scores": job.base_scores, "evaluation": {}, "gate": {},
        "adapter": str(tmp_path / "adapter"), "eval_report": str(tmp_path / "report"),
        "run_id": "run", "experiment": "here",
    }  # fmt: skip
    code = (
        "import json, sys\nfrom tuneline import steps\n"
        "steps.guard(steps.compare_leg, **json.loads(sys.argv[1]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TUNELINE_CHECKPOINTS": str(checkpoints),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "TUNELINE_MLFLOW_ARTIFACTS": (tmp_path / "artifacts").as_uri(),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step " in line and "loss" in line:
            break
    leg = child_of(psutil.Process(process.pid))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "compare_leg was stopped by SIGTERM" in errors
    assert not leg.is_running()
    assert [path.stat().st_size for path in (checkpoints / "legs").iterdir()] == [0]
    assert any(checkpoints.rglob("trainer_state.json"))  # to go on from


def test_full_weights_and_4_bit_legs_use_the_same_base_scores(job: Job, tmp_path: Path) -> None:
    legs = legs_of(resolved(training={"epochs": 0.2, "batch_tokens": 512}), ["full", "qlora"])
    rows = [watch.run_watched(into(job, tmp_path / leg.name, leg=leg.values()), {}) for leg in legs]
    assert [r["status"] for r in rows] == [FINISHED, FINISHED]
    assert rows[0]["base"] == rows[1]["base"]
    assert rows[0]["trainable_fraction"] == 1.0
    board = leaderboard.rank(rows)
    assert {r["rank"] for r in board["legs"]} == {1, 2}


def test_a_damaged_base_measurement_is_refused(job: Job, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(job.base_scores, copy)
    with (copy / "measured.json").open("a") as file:
        file.write(" ")
    failed = watch.run_watched(into(job, tmp_path, base_scores=str(copy)), {})
    assert failed["status"] == FAILED and "is damaged: measured.json" in failed["reason"]
