"""Whole evaluations of a tiny tuned model: what is measured, compared, kept and refused."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneline import artifacts, form, steps
from tuneline.artifacts import Artifact
from tuneline.errors import ArtifactError, DataError, ModelError, RecipeError, RegistryError
from tuneline.evaluate.evaluate import _figures
from tuneline.evaluate.generate import batches_by_tokens, generate_answers
from tuneline.evaluate.likelihood import negative_log_likelihoods
from tuneline.evaluate.rows import EvalRow, digest_of_rows, read_test_rows, slices_of
from tuneline.recipe import EvaluationSection, check
from tuneline.register.package import package_of


@dataclass(frozen=True)
class Line:
    """A base, rows and an adapter that belong together."""

    base: str
    dataset: Path
    adapter: Path


def with_columns(dataset: Path, target: Path) -> Path:
    """The data set again, each test row with the columns of its raw row."""
    made = artifacts.load(dataset, "prepared_dataset")
    shutil.copytree(dataset, target)
    (target / artifacts.MANIFEST).unlink()
    rows = made.read_jsonl("test_rows.jsonl")
    for row in rows:
        row["columns"] = {"fruit": row["question"].split()[0], "id": row["question"]}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (target / "test_rows.jsonl").write_text(text)
    manifest = made.manifest
    artifacts.seal(
        target,
        kind="prepared_dataset",
        config=manifest.config,
        base_model=manifest.base_model,
        inputs=manifest.inputs,
    )
    return target


@pytest.fixture(scope="module")
def line(tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    data = {"train": [str(chats_file)], "test_fraction": 0.25}
    steps.prepare_data(str(tiny_model), data, str(folder / "plain"))
    dataset = with_columns(folder / "plain", folder / "data")
    steps.finetune(
        str(tiny_model),
        str(dataset),
        {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        {"epochs": 2, "learning_rate": 0.01, "batch_tokens": 512, "evaluations": 4},
        str(folder / "adapter"),
    )
    return Line(str(tiny_model), dataset, folder / "adapter")


def evaluate(line: Line, output: Path, champion_of: str = "", **sections: Any) -> dict[str, Any]:
    return steps.evaluate(
        line.base,
        str(line.adapter),
        str(line.dataset),
        sections.get("evaluation", {}),
        {"min_rows": 40} | sections.get("gate", {}),
        str(output),
        champion_of=champion_of,
    )


@pytest.fixture(scope="module")
def folder(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report"
    gate = {"slice_floors": {"fruit": 0.2}, "min_slice_rows": 5, "max_forgetting": 100}
    evaluate(line, path, evaluation={"slices": ["fruit"]}, gate=gate)
    return path


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_report_holds_what_other_steps_read(report: dict[str, Any]) -> None:
    assert report["metric"] == "exact_match" and report["champion"] is None
    assert report["base"] < 0.2 < 0.5 < report["tuned"]
    assert report["verdict"]["passed"] and report["verdict"]["reasons"] == []
    assert report["rows"] == report["test_rows"] >= 40
    low, high = report["difference_interval"]
    assert low < report["difference"] == report["tuned"] - report["base"] < high
    assert {"question", "reference", "base", "tuned"} <= report["samples"][0].keys()
    assert len(report["samples"]) == 3


def test_every_number_can_be_computed_again_from_the_kept_scores(
    folder: Path, report: dict[str, Any]
) -> None:
    rows = artifacts.load(folder, "eval_report").read_jsonl("scores.jsonl")
    assert len(rows) == report["test_rows"]
    for model in ("base", "tuned"):
        scores = [row["scores"][model] for row in rows]
        tokens = [row["tokens"] for row in rows]
        exact = sum(s["exact_match"] for s in scores) / len(rows)
        assert report["metrics"]["exact_match"][model]["score"] == pytest.approx(exact)
        nll = sum(s["cross_entropy"] * t for s, t in zip(scores, tokens, strict=True))
        assert report["metrics"]["cross_entropy"][model]["score"] == pytest.approx(
            nll / sum(tokens)
        )
    assert report["metrics"]["valid_json"]["rows"] == 0  # colours are no JSON
    assert all(row["scores"]["base"]["valid_json"] is None for row in rows)


def test_slices_part_the_rows(report: dict[str, Any]) -> None:
    parts = report["slices"]["fruit"]
    assert {part["value"] for part in parts} == {"apple", "plum", "pear", "fig", "lime"}
    assert sum(part["rows"] for part in parts) == report["test_rows"]
    means = [part["rows"] * part["metrics"]["exact_match"]["tuned"]["score"] for part in parts]
    assert sum(means) / report["test_rows"] == pytest.approx(report["tuned"])
    checks = [c["check"] for c in report["verdict"]["checks"]]
    assert checks.count("slice_floors.fruit") == 5 and "max_forgetting.general text" in checks


def test_forgetting_is_measured_on_the_projects_own_text(report: dict[str, Any]) -> None:
    general = report["forgetting"]["general text"]
    assert general["texts"] >= 50 and general["tokens"] > 2000
    low, high = general["tuned"]["change_interval"]
    assert low < general["tuned"]["change"] < high
    assert general["tuned"]["score"] == pytest.approx(
        general["base"]["score"] + general["tuned"]["change"]
    )


def test_cross_entropy_is_that_of_a_plain_computation(line: Line) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(line.base, dtype=torch.float32).eval()
    rows = read_test_rows(artifacts.load(line.dataset, "prepared_dataset"), 5)
    found = negative_log_likelihoods(
        model,
        [(row.input_ids, row.supervised) for row in rows],
        what="base",
        on_row=lambda done, total: None,
    )
    for row, nll in zip(rows, found, strict=True):
        ids = torch.tensor(row.input_ids)
        with torch.inference_mode():
            logs = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        wanted = -sum(
            float(logs[at - 1, ids[at]]) for at in range(1, len(ids)) if row.supervised[at]
        )
        assert nll == pytest.approx(wanted, rel=1e-4)


def test_metrics_of_tokens_generate_nothing(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr("transformers.GenerationMixin.generate", refuse)
    report = evaluate(
        line,
        tmp_path / "report",
        evaluation={"metrics": ["cross_entropy", "perplexity"], "general_text": False},
        gate={"metric": "cross_entropy"},
    )
    assert report["samples"] == [] and report["answers"] == {} and report["forgetting"] == {}
    assert report["verdict"]["passed"] and report["difference"] < 0 < report["gain"]
    assert "none were generated" in (tmp_path / "report" / "report.html").read_text()


def test_a_second_evaluation_is_the_same(line: Line, folder: Path, tmp_path: Path) -> None:
    gate = {"slice_floors": {"fruit": 0.2}, "min_slice_rows": 5, "max_forgetting": 100}
    evaluate(line, tmp_path / "again", evaluation={"slices": ["fruit"]}, gate=gate)
    for name in ("scores.jsonl", "report.json", "report.html", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_answers_cut_at_the_limit_are_counted(line: Line, tmp_path: Path) -> None:
    report = evaluate(
        line,
        tmp_path / "report",
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 1, "general_text": False},
    )
    assert report["answers"]["tuned"]["cut"] == report["answers"]["tuned"]["count"] > 0


def test_named_text_sets(line: Line, tmp_path: Path) -> None:
    plain = tmp_path / "own.txt"
    plain.write_text("First paragraph,\nin two lines.\n\n\nSecond one.\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Only one."}\n')
    cheap = {"metrics": ["cross_entropy"], "general_text": False}
    sets = {"forgetting_sets": {"own": str(plain), "rows": str(rows)}}
    report = evaluate(
        line, tmp_path / "report", evaluation=cheap | sets, gate={"metric": "cross_entropy"}
    )
    assert {name: s["texts"] for name, s in report["forgetting"].items()} == {"own": 2, "rows": 1}


@pytest.mark.parametrize("name", ["general text", "General_Text", " "])
def test_a_text_set_of_the_projects_own_name_is_a_fault_of_the_recipe(name: str) -> None:
    with pytest.raises(RecipeError, match="is no name for a set of yours"):
        check(EvaluationSection, {"forgetting_sets": {name: "own.txt"}}, source="evaluation")


def test_figures_of_any_name_reach_mlflow_and_none_hides_another(report: dict[str, Any]) -> None:
    from mlflow.utils.validation import _validate_metric_name

    odd = ("pass@1", "pass#1", "a\nb")
    block = report["metrics"]["exact_match"]
    found = copy.deepcopy(report)
    found["metrics"] |= dict.fromkeys(odd, block)
    found["forgetting"] |= dict.fromkeys(odd, report["forgetting"]["general text"])
    found["tasks"] = {
        "a": {"metrics": {"b_c": block}}, "a_b": {"metrics": {"c": block}},
        "ä": {"metrics": {"acc,none": block}},
    }  # fmt: skip
    plain, figures = _figures(report), _figures(found)
    assert plain.items() <= figures.items() and "forgetting_general_text" in plain
    assert len(figures) == len(plain) + 3 * 2 + 3 + 3 * 2
    for key in figures:
        _validate_metric_name(key)


@pytest.mark.parametrize("metric", ["cross_entropy", "exact_match"])
def test_samples_show_what_the_tuned_model_does_best(
    line: Line, folder: Path, tmp_path: Path, metric: str
) -> None:
    report = json.loads((folder / "report.json").read_text())
    if metric == "cross_entropy":
        chosen = {"metrics": ["cross_entropy", "exact_match"], "general_text": False}
        report = evaluate(line, tmp_path / "r", evaluation=chosen, gate={"metric": metric})
    assert report["samples_by"] == "exact match"
    right = [sample["tuned_exact_match"] for sample in report["samples"]]
    assert right[:2] == [1, 1] and right[2] == (
        report["metrics"]["exact_match"]["tuned"]["score"] == 1
    )


def test_the_engine_of_the_answers_is_kept(report: dict[str, Any]) -> None:
    from importlib.metadata import version

    assert report["engine"] == f"transformers {version('transformers')}"


def test_rows_without_a_column_are_a_slice_of_their_own() -> None:
    rows = [
        EvalRow(n, {"columns": {"language": value} if value else {}}, [1, 2], [0, 1])
        for n, value in enumerate(["zh", None, "en", "None", None])
    ]
    found = slices_of(rows, ["language"])["language"]
    assert list(found.items()) == [("None", [3]), ("en", [2]), ("zh", [0]), (None, [1, 4])]


def test_text_rows_beside_chats_are_part_of_the_evaluation_set() -> None:
    chat = EvalRow(0, {"prompt": "a", "reference": "b"}, [1, 2], [0, 1])
    text, other = EvalRow(1, {}, [3, 4], [0, 1]), EvalRow(1, {}, [3, 5], [0, 1])
    assert digest_of_rows([chat, text]) != digest_of_rows([chat, other])
    # as it always was where rows are of one kind
    assert digest_of_rows([chat]) == artifacts.digest_of([["a", "b"]])
    assert digest_of_rows([text]) == artifacts.digest_of([[3, 4]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "can't be read"),
        ("empty.txt", b" \n\n", "holds no text"),
        ("broken.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "line 2: no JSON object with"),
        ("number.jsonl", b'{"text": 1}\n', "text is int"),
        ("latin.txt", b"caf\xe9\n", "is not UTF-8"),
    ],
)
def test_a_bad_text_set_is_refused_before_a_model_is_loaded(
    line: Line, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sets = {"forgetting_sets": {"own": str(tmp_path / name)}}
    with pytest.raises(DataError, match=message):
        evaluate(line, tmp_path / "report", evaluation=sets)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [("kind", "no test row has a column 'kind'; columns are fruit, id"), ("id", "at most 10 ")],
)
def test_a_column_that_is_no_slice_is_refused(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, message: str
) -> None:
    monkeypatch.setattr("tuneline.evaluate.rows._MOST_SLICES", 10)
    with pytest.raises(DataError, match=message):
        evaluate(line, tmp_path / "report", evaluation={"slices": [column]})


def test_a_deciding_metric_that_applies_to_no_row_is_refused(line: Line, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metric json_fields applies to none of the"):
        evaluate(line, tmp_path / "report", gate={"metric": "json_fields"})


def prepare_for(line: Line, chats_file: Path, output: Path, **sections: Any) -> None:
    data = {"train": [str(chats_file)], "test_fraction": 0.25}
    steps.prepare_data(line.base, data, str(output), **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"slices": ["kind"]}}, "no test row has a column 'kind'"),
        ({"evaluation": {}, "gate": {"metric": "json_fields"}}, "json_fields applies to none of"),
    ],
)
def test_an_evaluation_that_the_rows_cannot_give_ends_before_the_training(
    line: Line, chats_file: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare_for(line, chats_file, tmp_path / "data", **sections)


def test_a_gate_that_will_refuse_for_want_of_rows_says_so_before_the_training(
    line: Line, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_for(line, chats_file, tmp_path / "data", evaluation={}, gate={"min_rows": 1000})
    assert "test rows are fewer than gate.min_rows 1000" in capsys.readouterr().out


def filled_form(**values: str) -> dict[str, Any]:
    names = {"train_data": "rows.jsonl", "test_data": "", "model_name": "m", "experiment": "e"}
    return form.DEFAULTS | names | values


def test_a_text_set_that_is_not_there_is_a_fault_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    sets = {"a": str(tmp_path / "none.txt"), "b": str(tmp_path / "empty.txt")}
    overrides = {"evaluation": {"forgetting_sets": sets}}
    with pytest.raises(RecipeError) as error:
        steps.check_recipe(filled_form(base_model="demo"), "lora", {}, overrides, "", "e")
    assert [fault.partition(": ")[2] for fault in error.value.faults] == [
        f"{tmp_path}/none.txt can't be read (No such file or directory): name a local file",
        f"{tmp_path}/empty.txt holds no text",
    ]


@pytest.mark.parametrize(("limit", "told"), [(1024, False), (1025, True)])
def test_prompts_that_may_leave_no_room_are_told_of_before_the_training(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], limit: int, told: bool
) -> None:
    overrides = {"evaluation": {"max_new_tokens": limit}, "data": {"max_seq_len": 1024}}
    steps.check_recipe(filled_form(base_model=str(tiny_model)), "lora", {}, overrides, "", "e")
    assert ("more than the model's context of 2048 tokens" in capsys.readouterr().out) == told


def test_a_broken_model_is_no_refusal_but_an_error(line: Line, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = artifacts.load(line.adapter, "adapter")
    target = tmp_path / "adapter"
    shutil.copytree(line.adapter, target)
    weights = load_file(target / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, target / "adapter_model.safetensors", {"format": "pt"})
    (target / artifacts.MANIFEST).unlink()
    manifest = broken.manifest
    artifacts.seal(
        target,
        kind="adapter",
        config=manifest.config,
        base_model=manifest.base_model,
        inputs=manifest.inputs,
    )
    with pytest.raises(ModelError, match="tuned model on the test split: the loss of row 0 is nan"):
        evaluate(Line(line.base, line.dataset, target), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_more_rows_than_asked_for_are_drawn_by_hash(line: Line) -> None:
    dataset = artifacts.load(line.dataset, "prepared_dataset")
    every, some = read_test_rows(dataset, 1000), read_test_rows(dataset, 10)
    numbers = [row.number for row in some]
    assert len(numbers) == 10 and numbers == sorted(numbers) != list(range(10))
    assert set(numbers) <= {row.number for row in read_test_rows(dataset, 11)}
    for row in some:
        assert row == every[row.number]


def test_texts_and_tokens_of_different_rows_are_refused(line: Line, tmp_path: Path) -> None:
    shutil.copytree(line.dataset, tmp_path / "data")
    with (tmp_path / "data" / "test_rows.jsonl").open("a") as file:
        file.write('{"prompt": "x", "question": "x", "reference": "y"}\n')
    manifest = artifacts.load(line.dataset, "prepared_dataset").manifest
    with pytest.raises(ArtifactError, match="prepare the data again"):
        read_test_rows(Artifact(tmp_path / "data", manifest), 1000)


def test_batches_hold_the_budget_and_every_prompt_once() -> None:
    lengths = [5, 90, 7, 7, 40, 300, 6, 5]
    batches = list(batches_by_tokens(lengths, 3, 200, 20))
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert batches[0] == [5]  # longer than the budget: by itself
    for batch in batches[1:]:
        assert len(batch) <= 3
        assert len(batch) * (max(lengths[row] for row in batch) + 20) <= 200
    assert list(batches_by_tokens([], 3, 200, 20)) == []


def test_batching_does_not_change_answers(line: Line) -> None:
    from tuneline.data_prep.chat import load_tokenizer
    from tuneline.finetune.load import load_base

    model, tokenizer = load_base(Path(line.base)), load_tokenizer(line.base)
    prompts = [row.prompt or "" for row in read_test_rows(
        artifacts.load(line.dataset, "prepared_dataset"), 12
    )] + ["a " * 40]  # fmt: skip

    def answers(batch_size: int, batch_tokens: int) -> list[str]:
        found = generate_answers(
            model,
            tokenizer,
            prompts,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_new_tokens=6,
            on_batch=lambda done, total: None,
        )
        return [answer.text for answer in found]

    together = answers(32, 10_000)
    assert together == answers(1, 10_000) == answers(32, 60)
    assert len(set(together)) > 1


def test_prompts_without_room_are_cut_and_counted(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    data = {"train": [str(chats_file)], "test_fraction": 0.25, "max_seq_len": 64}
    steps.prepare_data(str(small), data, str(tmp_path / "data"))
    settings = {"epochs": 0.1, "batch_tokens": 512}
    steps.finetune(
        str(small), str(tmp_path / "data"), {"name": "bitfit", "missing_biases": "add"}, settings,
        str(tmp_path / "adapter"),
    )  # fmt: skip
    report = evaluate(
        Line(str(small), tmp_path / "data", tmp_path / "adapter"),
        tmp_path / "report",
        evaluation={"metrics": ["exact_match"], "general_text": False, "max_rows": 20},
    )
    for model in ("base", "tuned"):
        assert report["answers"][model]["prompts_cut"] == report["answers"][model]["count"] == 20
    assert "20 prompts lost their start" in (tmp_path / "report" / "report.html").read_text()


@pytest.fixture
def registry(
    line: Line,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[str]:
    """A store for the model `colours`, and the tuned model, merged or in another form."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts of a sqlite store there
    export = {"form": getattr(request, "param", "merged")}
    steps.merge(line.base, str(line.adapter), export, str(tmp_path / "merged"))
    yield "colours"


def make_champion(tmp_path: Path, folder: Path, name: str) -> None:
    from tuneline.register.promote import Request, promote
    from tuneline.register.register import register
    from tuneline.tracking import Untracked

    version = register(tmp_path / "merged", folder, name, "", Untracked())
    assert promote(name, Request(version, "me")).alias == "champion"


CHEAP = {"metrics": ["exact_match", "cross_entropy"], "general_text": False}


@pytest.mark.slow
@pytest.mark.parametrize("registry", ["merged", "packaged"], indirect=True)
def test_the_champion_is_measured_on_the_same_rows(
    line: Line, folder: Path, registry: str, tmp_path: Path
) -> None:
    before = evaluate(line, tmp_path / "first", champion_of=registry, evaluation=CHEAP)
    assert before["champion"] is None and before["verdict"]["passed"]
    make_champion(tmp_path, folder, registry)
    report = evaluate(line, tmp_path / "second", champion_of=registry, evaluation=CHEAP)
    champion = report["champion"]
    merged = artifacts.load(tmp_path / "merged", package_of(tmp_path / "merged").kind)
    assert (champion["name"], champion["version"]) == (registry, 1)
    assert champion["digest"] == merged.digest and champion["compared"]
    assert champion["score"] == report["tuned"]  # it is the same model, merged
    # and so it is no better than itself
    assert not report["verdict"]["passed"]
    assert "champion (version 1)" in report["verdict"]["reasons"][0]
    exact = report["metrics"]["exact_match"]
    assert exact["over_champion"]["difference_interval"] == [0.0, 0.0]
    inputs = artifacts.load(tmp_path / "second", "eval_report").manifest.inputs
    assert inputs["champion"] == merged.digest
    rows = artifacts.load(tmp_path / "second", "eval_report").read_jsonl("scores.jsonl")
    assert rows[0]["scores"].keys() == {"base", "tuned", "champion"}

    ignored = evaluate(
        line,
        tmp_path / "third",
        champion_of=registry,
        evaluation=CHEAP,
        gate={"champion": "ignore"},
    )
    assert ignored["champion"] is None and ignored["verdict"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("registry", ["packaged"], indirect=True)
# MLflow 3.17 on its own types, when mlflow.pyfunc is imported
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType")
def test_a_packaged_champion_answers_from_the_registry(
    line: Line, folder: Path, registry: str, tmp_path: Path
) -> None:
    import mlflow

    make_champion(tmp_path, folder, registry)
    served = mlflow.pyfunc.load_model(f"models:/{registry}@champion")
    scored = artifacts.load(folder, "eval_report").read_json("report.json")["samples"][0]
    assert served.predict([scored["question"]])[0].strip() == scored["tuned"].strip()


@pytest.mark.slow
def test_a_champion_of_another_template_is_not_compared_and_refuses(
    line: Line, folder: Path, registry: str, tmp_path: Path
) -> None:
    merged = artifacts.load(tmp_path / "merged", "merged_model")
    template = tmp_path / "merged" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    (tmp_path / "merged" / artifacts.MANIFEST).unlink()
    manifest = merged.manifest
    artifacts.seal(
        tmp_path / "merged",
        kind="merged_model",
        config=manifest.config,
        base_model=manifest.base_model,
        inputs=manifest.inputs,
    )
    make_champion(tmp_path, folder, registry)
    report = evaluate(line, tmp_path / "report", champion_of=registry, evaluation=CHEAP)
    assert not report["champion"]["compared"] and report["champion"]["score"] is None
    assert "another chat template" in report["verdict"]["reasons"][0]


@pytest.mark.slow
def test_a_champion_whose_files_changed_stops_the_step(
    line: Line, folder: Path, registry: str, tmp_path: Path
) -> None:
    make_champion(tmp_path, folder, registry)
    (weights,) = tmp_path.glob("mlruns/**/model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RegistryError, match=r"colours version 1 .*differs from its SHA-256.*"):
        evaluate(line, tmp_path / "report", champion_of=registry, evaluation=CHEAP)
    assert not (tmp_path / "report").exists()
