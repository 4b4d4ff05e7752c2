"""lm-eval's tasks on a tiny model, without a network: what is measured, compared and refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline import artifacts, steps
from tuneline.errors import ArtifactError, DataError, RecipeError
from tuneline.evaluate.evaluate import measure_base
from tuneline.evaluate.gate import decide
from tuneline.evaluate.task_files import check_tasks, read_task_file
from tuneline.evaluate.tasks import LoadedTask, TaskResult, compare_tasks, load_tasks, run_tasks
from tuneline.evaluate.vllm_answers import chosen_engine, hindrance
from tuneline.recipe import EvaluationSection, GateSection, check, check_gate

COLOURS = ["red", "blue", "green", "white"]
CHOICE = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "colours.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": COLOURS,
    "doc_to_target": "{{colour}}",
    "target_delimiter": "",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ],
    "metadata": {"version": 1.5},
}
WRITE = {
    **{key: CHOICE[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_text")},
    "task": "write",
    "output_type": "generate_until",
    "doc_to_target": "{{colour}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
EVALUATION = {"metrics": ["exact_match"], "general_text": False, "task_chat_template": True}


@dataclass(frozen=True)
class Line:
    """A base, rows, an adapter and task files."""

    base: str
    dataset: str
    adapter: str
    tasks: tuple[str, str]


def write_task(folder: Path, values: dict[str, Any], name: str = "") -> str:
    path = folder / f"{name or values['task']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def write_documents(folder: Path, count: int = 20) -> None:
    # of the kind that the model was tuned on, and in none of its rows
    documents = [
        {"text": f"{fruit} number {number} is {colour}", "colour": colour}
        for number in (12, 13)
        for fruit in ("apple", "plum", "pear")
        for colour in COLOURS
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents[:count]))


@pytest.fixture(scope="module")
def line(tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    data = {"train": [str(chats_file)], "test_fraction": 0.25}
    steps.prepare_data(str(tiny_model), data, str(folder / "data"))
    steps.finetune(
        str(tiny_model),
        str(folder / "data"),
        {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        {"epochs": 2, "learning_rate": 0.01, "batch_tokens": 512},
        str(folder / "adapter"),
    )
    write_documents(folder)
    return Line(
        str(tiny_model),
        str(folder / "data"),
        str(folder / "adapter"),
        (write_task(folder, CHOICE), write_task(folder, WRITE)),
    )


def evaluate(line: Line, output: Path, gate: dict[str, Any], **evaluation: Any) -> dict[str, Any]:
    return steps.evaluate(
        line.base,
        line.adapter,
        line.dataset,
        EVALUATION | {"tasks": line.tasks} | evaluation,
        {"min_rows": 40} | gate,
        str(output),
    )


@pytest.fixture(scope="module")
def folder(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report"
    evaluate(line, path, {"max_task_drop": {"colours": 0.05, "write:exact_match": 0.0}})
    return path


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_every_figure_of_a_task_can_be_computed_again_from_its_documents(
    folder: Path, report: dict[str, Any]
) -> None:
    from lm_eval.api.metrics import mean_stderr

    kept = artifacts.load(folder, "eval_report").read_jsonl("task_scores.jsonl")
    assert report["tasks"].keys() == {"colours", "write"}
    for label, metric in (("colours", "acc"), ("write", "exact_match")):
        task = report["tasks"][label]
        rows = [row["scores"] for row in kept if row["task"] == label]
        assert len(rows) == task["documents"] == task["of_documents"] == 20
        assert task["cut"] == {"base": 0, "tuned": 0}
        block = task["metrics"][metric]
        for model in ("base", "tuned"):
            scores = [row[model][metric] for row in rows]
            assert block[model]["score"] == pytest.approx(sum(scores) / 20)
            assert block[model]["stderr"] == pytest.approx(mean_stderr(scores))
        low, high = block["over_base"]["gain_interval"]
        assert low <= block["over_base"]["gain"] <= high
    assert report["tasks"]["colours"]["versions"] == {"colours": "1.5"}
    assert (
        report["tasks"]["write"]["metrics"]["exact_match"]["tuned"]["score"]
        > report["tasks"]["write"]["metrics"]["exact_match"]["base"]["score"]
    )


def test_a_corpus_metric_has_one_figure_and_no_interval(report: dict[str, Any]) -> None:
    block = report["tasks"]["colours"]["metrics"]["mcc"]
    assert block["tuned"]["score"] is not None and block["tuned"]["interval"] == [None, None]
    assert block["over_base"]["gain_interval"] == [None, None]


def test_the_scores_are_lm_evals_own_on_the_same_model(
    line: Line, report: dict[str, Any], tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    values = read_task_file(Path(line.tasks[0]), allow_code=False)
    values["dataset_kwargs"]["cache_dir"] = str(tmp_path)
    found = simple_evaluate(
        HFLM(pretrained=line.base, device="cpu", dtype="float32", batch_size=1),
        tasks=[values],
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert found is not None
    ours = report["tasks"]["colours"]["metrics"]
    for metric in ("acc", "mcc"):
        theirs = found["results"]["colours"][f"{metric},none"]
        assert ours[metric]["base"]["score"] == pytest.approx(theirs)


def test_tasks_are_shown_and_judged(folder: Path, report: dict[str, Any]) -> None:
    checks = {c["check"]: c for c in report["verdict"]["checks"]}
    assert checks["max_task_drop.write:exact_match"]["passed"]
    assert "task colours lost up to" in checks["max_task_drop.colours"]["sentence"]
    page = (folder / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page and report["tasks"]["write"]["digest"] in page
    assert "one figure for the whole task" in page and len(page) < 1_000_000


def test_a_base_that_was_measured_before_counts_on_the_same_task_only(
    line: Line, report: dict[str, Any], tmp_path: Path
) -> None:
    settings = check(EvaluationSection, EVALUATION | {"tasks": line.tasks[:1]}, source="test")
    base = measure_base(line.base, Path(line.dataset), settings, tmp_path / "base")
    values = base.read_json("measured.json")["tasks"]["colours"]
    assert values["digest"] == report["tasks"]["colours"]["digest"]
    before = TaskResult(**values)
    tasks = load_tasks(settings)
    same = {name: {"colours": before} for name in ("base", "tuned", "champion")}
    acc = compare_tasks(same, tasks)["colours"]["metrics"]["acc"]
    assert acc["over_base"]["difference_interval"] == [0.0, 0.0]
    assert acc["over_champion"]["gain_interval"] == [0.0, 0.0] and "over_tuned" not in acc
    other = replace(before, digest="sha256:other")
    with pytest.raises(ArtifactError, match="asked different things"):
        compare_tasks({"base": {"colours": before}, "tuned": {"colours": other}}, tasks)


@pytest.fixture(scope="module")
def model_of(line: Line) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        from tuneline.finetune.load import load_base

        return load_base(Path(line.base)), AutoTokenizer.from_pretrained(line.base)

    return load


def scores_of(
    model_of: Callable[[], tuple[Any, Any]], tasks: list[LoadedTask], **settings: Any
) -> dict[str, TaskResult]:
    model, tokenizer = model_of()
    section = check(EvaluationSection, settings, source="test")
    return run_tasks("base", model, tokenizer, tasks, section, lambda *_: lambda *_: None)


def test_a_limit_takes_the_first_documents_and_changes_the_digest(
    line: Line, model_of: Callable[[], tuple[Any, Any]]
) -> None:
    tasks = load_tasks(EvaluationSection(tasks=line.tasks[:1]))
    every = scores_of(model_of, tasks)["colours"]
    some = scores_of(model_of, tasks, task_limit=5)["colours"]
    assert some.documents == every.documents[:5] == [f"colours:{n}" for n in range(5)]
    assert some.metrics["acc"]["documents"] == every.metrics["acc"]["documents"][:5]
    assert some.digest != every.digest


def test_the_documents_of_a_group_are_pooled(
    line: Line, model_of: Callable[[], tuple[Any, Any]], tmp_path: Path
) -> None:
    write_documents(tmp_path, 6)
    first = load_tasks(EvaluationSection(tasks=line.tasks[:1]))[0]
    small = load_tasks(EvaluationSection(tasks=(write_task(tmp_path, CHOICE | {"task": "few"}),)))[
        0
    ]
    group = LoadedTask("group", first.leaves | small.leaves)
    found = scores_of(model_of, [first, small, group])
    pooled = found["group"].metrics["acc"]["documents"]
    parts = [found[name].metrics["acc"]["documents"] for name in ("colours", "few")]
    assert pooled == parts[0] + parts[1] and len(pooled) == 26
    assert found["group"].metrics["acc"]["score"] == pytest.approx(sum(pooled) / 26)
    assert "mcc" not in found["group"].metrics  # of no document, so of no pool


def test_a_prompt_that_the_context_cuts_is_counted(
    model_of: Callable[[], tuple[Any, Any]], tmp_path: Path
) -> None:
    documents = [{"text": "apple " * 3000, "colour": "red"}, {"text": "plum", "colour": "blue"}]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    tasks = load_tasks(
        EvaluationSection(tasks=(write_task(tmp_path, CHOICE), write_task(tmp_path, WRITE)))
    )
    found = scores_of(model_of, tasks)
    assert (found["colours"].cut, found["write"].cut) == (1, 1)


def test_virtual_tokens_meet_no_padding(
    line: Line, model_of: Callable[[], tuple[Any, Any]]
) -> None:
    from peft import PromptTuningConfig, get_peft_model

    tasks = load_tasks(EvaluationSection(tasks=line.tasks))
    model, tokenizer = model_of()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    def scores(size: int) -> dict[str, TaskResult]:
        section = EvaluationSection(task_batch_size=size)
        return run_tasks("tuned", tuned, tokenizer, tasks, section, lambda *_: lambda *_: None)

    assert scores(8) == scores(1)


def test_the_model_is_left_as_it_was(line: Line, model_of: Callable[[], tuple[Any, Any]]) -> None:
    import torch

    tasks = load_tasks(EvaluationSection(tasks=line.tasks[:1]))
    model, tokenizer = model_of()
    # apart, though the configuration has them tied: as a tuned output layer is
    apart = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight = apart
    section = EvaluationSection(task_limit=2)
    run_tasks("base", model, tokenizer, tasks, section, lambda *_: lambda *_: None)
    assert model.lm_head.weight is apart and "tie_weights" not in vars(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "has no `task: NAME`"),
        ({"group": "all"}, "has keys that run code or that no task has (group)"),
        ({"class": "x.Y"}, "(class)"),
        ({"custom_dataset": "x"}, "(custom_dataset)"),
        ({"unsafe_code": True}, "(unsafe_code)"),
        ({"process_results": "x"}, "(process_results)"),
        ({"doc_to_txt": "x"}, "(doc_to_txt)"),
        ({"output_type": "guess"}, "has output_type 'guess'; allowed are multiple_choice"),
        ({"dataset_path": None}, "has no dataset_path"),
        ({"test_split": None}, "names neither a test_split nor a validation_split"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "asks for trust_remote_code"),
        ({"dataset_kwargs": {"data_files": "none.jsonl"}}, "reads none.jsonl, which is neither in"),
        ({"dataset_kwargs": [1]}, "dataset_kwargs that are no mapping"),
        ({"metric_list": [{"metric": "bleurt", "hf_evaluate": True}]}, "from the hub"),
        ({"metric_list": "acc"}, "a metric_list that is not a list"),
        ({"include": "none.yaml"}, "can't be read"),
        ({"include": "colours.yaml"}, "includes itself"),
    ],
)
def test_a_task_file_that_is_none_or_runs_code_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_documents(tmp_path)
    path = write_task(tmp_path, CHOICE | changes, "colours")
    with pytest.raises(RecipeError, match=r"colours\.yaml") as refused:
        check_tasks(EvaluationSection(tasks=(path,)))
    assert message in str(refused.value) and len(refused.value.faults) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "is not YAML"),
        ("- 1", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("task: !!python/object/apply:os.system [touch ran]", "is not YAML"),
        ("task: x\nprocess_docs: !function own.run", "names the Python function own.run"),
        (b"task: \xff", "is not UTF-8"),
        (None, "can't be read (No such file or directory"),
    ],
)
def test_a_file_is_read_without_running_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("open('ran', 'w')\ndef run(docs): return docs\n")
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        check_tasks(EvaluationSection(tasks=("bad.yaml",)))
    assert message in str(refused.value) and not (tmp_path / "ran").exists()


def test_functions_run_where_the_recipe_allows_them(
    tmp_path: Path, model_of: Callable[[], tuple[Any, Any]]
) -> None:
    write_documents(tmp_path)
    (tmp_path / "own.py").write_text("def half(docs):\n    return docs.select(range(10))\n")
    path = Path(write_task(tmp_path, CHOICE))
    path.write_text(path.read_text() + "process_docs: !function own.half\n")
    tasks = load_tasks(EvaluationSection(tasks=(str(path),), task_code=True))
    assert len(scores_of(model_of, tasks)["colours"].documents) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_list": [{"metric": "accurracy"}]}, "no metric accurracy of its own"),
        (
            {"metric_list": [{"metric": "acc", "aggregation": "avg"}]},
            "metric acc: lm-eval has no aggregation avg",
        ),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "SecurityError"),
        ({"doc_to_text": "{{ nothing }}"}, "UndefinedError"),
        ({"test_split": "tset"}, "KeyError"),
        ({"doc_to_choice": "{{"}, "TemplateSyntaxError"),
    ],
)
def test_a_task_that_does_not_fit_its_data_is_refused_before_a_model_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_documents(tmp_path)
    with pytest.raises(DataError, match="task colours can't be loaded") as refused:
        load_tasks(EvaluationSection(tasks=(write_task(tmp_path, CHOICE | changes),)))
    assert message in str(refused.value)


def test_a_named_task_is_known_and_its_data_is_asked_for_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError) as refused:
        check_tasks(EvaluationSection(tasks=("arc_easy", "arc_eazy")))
    faults = refused.value.faults
    assert "task arc_easy: its data set is not in the local cache" in faults[0]
    assert "allenai/ai2_arc" in faults[0]
    assert "no task arc_eazy" in faults[1] and "Did you mean 'arc_easy'?" in faults[1]
    (tmp_path / "datasets" / "allenai___ai2_arc").mkdir(parents=True)
    check_tasks(EvaluationSection(tasks=("arc_easy",)))
    with pytest.raises(DataError, match="task arc_easy: its data set is not in the local cache"):
        load_tasks(EvaluationSection(tasks=("arc_easy",)))  # an empty folder is no data set


def test_a_task_of_lm_evals_own_runs_on_a_local_copy_of_its_data(
    model_of: Callable[[], tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    splits = ("train", "validation", "test")
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = {"configs": [{"config_name": "ARC-Easy", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    rows = [
        {
            "question": f"Which of these is the number {number}?",
            "choices": {"text": [str(n) for n in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[number],
        }
        for number in range(4)
    ]
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    found = scores_of(model_of, load_tasks(EvaluationSection(tasks=("arc_easy",))))["arc_easy"]
    assert found.documents == [f"arc_easy:{number}" for number in range(4)]
    assert found.metrics.keys() == {"acc", "acc_norm"} and found.versions == {"arc_easy": "1.0"}


def test_a_named_task_that_runs_what_a_model_wrote_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(RecipeError, match="task humaneval runs code that the model writes"):
        check_tasks(EvaluationSection(tasks=("humaneval",)))
    check_tasks(EvaluationSection(tasks=("humaneval",), task_code=True))


def test_checking_imports_neither_torch_nor_lm_eval(line: Line) -> None:
    code = (
        "import sys\nfrom tuneline.recipe import EvaluationSection\n"
        "from tuneline.steps import _check_evaluation\n"
        "_check_evaluation(EvaluationSection(tasks=(sys.argv[1], 'gsm8k')))\n"
        "print([m for m in ('torch', 'lm_eval', 'datasets', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, line.tasks[0]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"},
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_without_lm_eval_tasks_are_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneline.evaluate.task_files.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"install tuneline\[lm-eval\]"):
        check_tasks(EvaluationSection(tasks=line.tasks))
    check_tasks(EvaluationSection())


def test_settings_of_tasks_are_checked_together() -> None:
    with pytest.raises(RecipeError, match="two tasks go by the name arc_easy"):
        check(EvaluationSection, {"tasks": ["arc_easy", "x/arc_easy.yaml"]}, source="evaluation")
    with pytest.raises(RecipeError, match="a drop is at least 0"):
        check(GateSection, {"max_task_drop": {"x": -0.1}}, source="gate")
    section = EvaluationSection(tasks=("own/arith.yaml",))
    check_gate(GateSection(max_task_drop={"arith:acc": 0.1}), section, source="gate")
    with pytest.raises(RecipeError, match=r"hella is not among evaluation.tasks \(arith\)"):
        check_gate(GateSection(max_task_drop={"hella": 0.1}), section, source="gate")


@pytest.mark.parametrize(
    ("place", "most", "passed", "sentence"),
    [
        ("x", 0.3, True, "task x lost up to 0.250 in acc (95 % interval), within"),
        ("x:acc", 0.2, False, "task x lost up to 0.250 in acc (95 % interval), more than"),
        ("x:f1", 0.5, False, "f1 has no score a document"),
        ("x:bleu", 0.5, False, "task x has no metric bleu, so it can't be checked: it has acc, f1"),
        ("y", 0.5, False, "it was not measured"),
    ],
)
def test_a_drop_is_judged_by_the_far_end_of_its_interval(
    place: str, most: float, passed: bool, sentence: str
) -> None:
    def block(low: float | None, high: float | None) -> dict[str, Any]:
        return {"rows": 200, "rows_excluded": 0, "over_base": {"gain_interval": [low, high]}}

    result = {
        "metrics": {"exact_match": block(0.1, 0.2)},
        "slices": {},
        "champion": None,
        "tasks": {"x": {"metrics": {"acc": block(-0.25, 0.05), "f1": block(None, None)}}},
    }
    verdict = decide(result, GateSection(max_task_drop={place: most}))
    last = verdict["checks"][-1]
    assert last["passed"] is verdict["passed"] is passed and sentence in last["sentence"]


def test_vllm_is_taken_where_it_can_run_and_refused_where_it_is_asked_for_and_can_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EvaluationSection().engine == "auto"
    assert chosen_engine("auto") == chosen_engine("transformers") == "transformers"
    with pytest.raises(RecipeError, match="vllm is not installed here"):
        chosen_engine("vllm")
    monkeypatch.setattr("tuneline.evaluate.vllm_answers.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen_engine("auto") == "transformers"
    with pytest.raises(RecipeError, match="vllm needs an accelerator"):
        chosen_engine("vllm")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    assert chosen_engine("auto") == "transformers"
    with pytest.raises(RecipeError, match=r"needs compute capability 7\.0, .* has 6\.1"):
        chosen_engine("vllm")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    assert chosen_engine("auto") == chosen_engine("vllm") == "vllm"
    assert chosen_engine("transformers") == "transformers"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"peft_type": "IA3"}, "no adapters of type IA3"),
        ({"use_dora": True}, "no LoRA with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "no LoRA with modules_to_save"),
        ({"bias": "all"}, "no LoRA with biases"),
        ({"r": 600}, "rank 600 is above 512"),
    ],
)
def test_vllm_answers_for_plain_lora_only(
    line: Line, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    from tuneline import base_model

    base = base_model.resolve(line.base)
    made = artifacts.load(Path(line.adapter), "adapter")
    config = json.loads((made.path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    (tmp_path / "base").mkdir()
    of_base = json.loads((base.path / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(of_base | {"dtype": "bfloat16"}))
    half = replace(base, path=tmp_path / "base")
    adapter = replace(made, path=tmp_path)
    assert reason in hindrance(half, adapter, None, measured_before=False)
    assert bool(reason) == bool(hindrance(half, adapter, None, measured_before=False))
    assert hindrance(half, adapter, None, measured_before=True)
    assert hindrance(half, None, None, measured_before=False)
    assert "16 bits only" in hindrance(base, made, None, measured_before=False)
