"""One base, several experts: each answers as it would alone."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tuneline import artifacts, base_model, recipe, steps
from tuneline.chat import Chat
from tuneline.data_prep.chat import Renderer, chat_format, load_tokenizer
from tuneline.data_prep.prepare import prepare
from tuneline.errors import ArtifactError
from tuneline.evaluate.generate import generate_answers
from tuneline.finetune.load import load_base, load_tuned
from tuneline.finetune.methods import METHODS
from tuneline.finetune.train import finetune
from tuneline.recipe import DataSection, TrainingSection
from tuneline.tracking import Untracked
from tuneline_pipelines.cli import main
from tuneline_pipelines.methods_cli import side_by_side

QUESTION = "plum number 3 is green"
OPTIONS = {"bitfit": {"missing_biases": "add"}, "lora": {"target_modules": ["all-linear"]}}
Adapter = Callable[[str], Path]


@pytest.fixture(scope="module")
def adapter(
    tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Adapter:
    """Trains an adapter of a method; `lora-2` is a second one of the method lora."""
    root = tmp_path_factory.mktemp("adapters")
    prepare(
        str(tiny_model), DataSection(train=(str(chats_file),), test_fraction=0.3), root / "data"
    )

    @cache
    def train(name: str) -> Path:
        method, _, seed = name.partition("-")
        settings = recipe.method_settings({"name": method, **OPTIONS.get(method, {})})
        training = TrainingSection(
            epochs=0.5, learning_rate=0.03, batch_tokens=512, seed=int(seed or 0)
        )
        out = root / name
        return finetune(str(tiny_model), root / "data", settings, training, out, Untracked()).path

    return train


def alone(tiny_model: Path, folder: Path | None) -> str:
    """What the base, or an adapter freshly loaded on it, answers."""
    base = base_model.resolve(str(tiny_model))
    loaded = load_tuned(base, artifacts.load(folder, "adapter")) if folder else load_base(base.path)
    tokenizer = load_tokenizer(str(tiny_model))
    renderer = Renderer(chat_format(tokenizer))
    prompt = renderer.template_text([{"role": "user", "content": QUESTION}], prompt=True)
    (answer,) = generate_answers(
        loaded, tokenizer, [prompt], batch_size=1, batch_tokens=1, max_new_tokens=12,
        on_batch=lambda done, total: None,
    )  # fmt: skip
    return answer.text if answer.ended else f"{answer.text} [cut]"


def test_every_method_answers_beside_the_others_as_it_does_alone(
    tiny_model: Path, adapter: Adapter
) -> None:
    names = [method.name for method in METHODS]
    names.insert(names.index("qlora") + 2, "lora-2")  # not beside the first one of its type
    with Chat(max_new_tokens=12) as chat:
        chat.add_base(str(tiny_model))
        for name in names:
            chat.add_adapter(name, adapter(name))
        chat.load()
        answers = dict(chat.ask(QUESTION))
        chat.reset()
        again = dict(chat.ask(QUESTION, [*reversed(names), "base"]))
    expected = {"base": alone(tiny_model, None)}
    expected |= {name: alone(tiny_model, adapter(name)) for name in names}
    assert answers == again == expected
    assert len({*expected.values()}) > 5  # they do differ


@pytest.mark.parametrize("name", ["prompt_tuning", "lora"])
def test_answers_in_a_batch_are_those_of_prompts_alone(
    name: str, tiny_model: Path, adapter: Adapter
) -> None:
    model = load_tuned(
        base_model.resolve(str(tiny_model)), artifacts.load(adapter(name), "adapter")
    )
    tokenizer = load_tokenizer(str(tiny_model))
    questions = [QUESTION, "fig", "lime number 11 is white, the pear is red", "plum", "pear", "fig"]
    renderer = Renderer(chat_format(tokenizer))
    prompts = [
        renderer.template_text([{"role": "user", "content": q}], prompt=True) for q in questions
    ]

    def answers(batch_size: int) -> list[str]:
        generated = generate_answers(
            model, tokenizer, prompts, batch_size=batch_size, batch_tokens=4096, max_new_tokens=20,
            on_batch=lambda done, total: None,
        )  # fmt: skip
        return [answer.text for answer in generated]

    assert answers(6) == answers(1)


def test_a_conversation_goes_on_for_each_speaker_alone(tiny_model: Path, adapter: Adapter) -> None:
    with Chat(system="Be brief.", max_new_tokens=12) as chat:
        chat.add_base(str(tiny_model))
        chat.add_adapter("law", adapter("lora"))
        first = dict(chat.ask(QUESTION, ["law"]))
        second = dict(chat.ask("and the fig?"))
        law, base = chat._speakers["law"].messages, chat._speakers["base"].messages
    said = [message["content"] for message in law]
    assert [message["role"] for message in law] == ["system", *["user", "assistant"] * 2]
    assert said[:3] == ["Be brief.", QUESTION, first["law"].removesuffix(" [cut]")]
    assert said[3:] == ["and the fig?", second["law"].removesuffix(" [cut]")]
    assert len(base) == 3


def test_only_a_4_bit_base_is_loaded_for_4_bit_adapters(
    tiny_model: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(path: Path, **options: object) -> object:
        asked.append(options["quantization"])
        return load_base(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("tuneline.finetune.load.load_base", load)
    with Chat(max_new_tokens=3) as chat:
        chat.add_base(str(tiny_model))
        chat.add_adapter("small", adapter("qlora"))
        chat.load()
        assert len(list(chat.ask(QUESTION))) == 2
    assert len(asked) == 1 and asked[0] is not None


def test_an_adapter_of_another_base_is_refused(
    tiny_model: Path, adapter: Adapter, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with Chat() as chat:
        chat.add_base(str(other))
        with pytest.raises(ArtifactError, match="was trained on tiny-llama"):
            chat.add_adapter("law", adapter("lora"))


def test_the_command_asks_once(
    tiny_model: Path, adapter: Adapter, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["chat", "--base-model", str(tiny_model), "--adapter", f"law={adapter('lora')}",
               "--max-new-tokens", "12", "--prompt", QUESTION]  # fmt: skip
    assert main([*command, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert answers == {
        "base": alone(tiny_model, None),
        "law": alone(tiny_model, adapter("lora")),
    }
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == side_by_side(list(answers.items())).strip()


def test_speakers_are_switched_in_the_conversation(
    tiny_model: Path,
    adapter: Adapter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter([QUESTION, "/use law", QUESTION, "/use lw", "/reset", "/all", QUESTION, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setenv("COLUMNS", "40")  # too narrow for columns
    command = ["chat", "--base-model", str(tiny_model), "--adapter", f"law={adapter('lora')}"]
    assert main([*command, "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr()
    blocks = [line for line in shown.out.splitlines() if line in ("base:", "law:")]
    assert blocks == ["base:", "law:", "law:", "base:", "law:"]
    assert "nobody here is called 'lw'; there are base, law. Did you mean 'law'?" in shown.err
    assert list(lines) == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "nobody to talk to"),
        (["--adapter", "law=x"], 2, "--adapter needs --base-model"),
        (["--base-model", "{tiny}", "--adapter", "law"], 2, "not of the form NAME=DIR"),
        (["--base-model", "{tiny}", "--adapter", "law=absent"], 1, "not a finished adapter"),
        (["--base-model", "{tiny}", "--adapter", "base={lora}"], 2, "two speakers are called"),
        (["--base-model", "absent"], 1, "base model 'absent' is no folder"),
        (["--model", "{tiny}"], 1, "not a finished merged_model"),
        (["--model", "models:/m"], 2, "not of the form models:/NAME@ALIAS"),
        (["--model", "models:/m@champion"], 1, "set MLFLOW_TRACKING_URI"),
        (["--base-model", "{tiny}", "--json"], 2, "--json needs --prompt"),
        (["--base-model", "{tiny}", "--max-new-tokens", "0"], 2, "must be at least 1"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said(
    arguments: list[str],
    code: int,
    sentence: str,
    tiny_model: Path,
    adapter: Adapter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [a.format(tiny=tiny_model, lora=adapter("lora")) for a in arguments]
    assert main(["chat", *given]) == code
    assert sentence in capsys.readouterr().err


def test_a_models_own_code_runs_only_when_it_is_pinned(
    model_reference: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = model_reference("baichuan_shaped")
    command = ["chat", "--prompt", QUESTION, "--max-new-tokens", "2", "--base-model"]
    assert main([*command, reference.partition("#")[0]]) == 1
    assert "is not run unless it is pinned" in capsys.readouterr().err
    assert main([*command, reference]) == 0


def test_a_registered_version_speaks_and_a_changed_one_does_not(
    tiny_model: Path,
    adapter: Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    tuned, base = str(adapter("lora")), str(tiny_model)
    steps.merge(base, tuned, {}, "merged")
    steps.evaluate(base, tuned, str(adapter("lora").with_name("data")), {}, {}, "report")
    assert steps.register("merged", "report", {"model_name": "m"}) == 1
    command = ["chat", "--prompt", QUESTION, "--max-new-tokens", "12", "--json", "--model"]
    capsys.readouterr()
    expected = alone(tiny_model, adapter("lora"))
    # a version that its gate refused, as here, has no alias of its own
    mlflow.MlflowClient().set_registered_model_alias("m", "mine", "1")
    for reference in ("merged", "models:/m/1", "models:/m@mine"):
        assert main([*command, reference]) == 0
        assert json.loads(capsys.readouterr().out) == {"model": expected}
    assert main([*command, "models:/m@champion"]) == 1
    assert "looking for models:/m@champion" in capsys.readouterr().err
    uri = mlflow.MlflowClient().get_model_version_download_uri("m", "1")
    folder = Path(uri.removeprefix("file://")) / "model"
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    assert main([*command, "models:/m/1"]) == 1
    assert "is damaged: config.json" in capsys.readouterr().err
    mlflow.set_tracking_uri(None)


def test_a_packaged_model_speaks_on_its_base_only(
    tiny_model: Path, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packaged, base = str(tmp_path / "packaged"), str(tiny_model)
    steps.merge(base, str(adapter("bottleneck")), {}, packaged)
    assert artifacts.load(Path(packaged), "packaged_model")
    command = ["chat", "--prompt", QUESTION, "--max-new-tokens", "12", "--json"]
    capsys.readouterr()
    assert main([*command, "--base-model", base, "--model", packaged]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "base": alone(tiny_model, None),
        "model": alone(tiny_model, adapter("bottleneck")),
    }
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main([*command, "--base-model", str(other), "--model", packaged]) == 1
    assert "was trained on tiny-llama" in capsys.readouterr().err


def test_columns_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "63")
    text = side_by_side([("base", "x" * 40 + "\n\nend"), ("law", "short")])
    assert text.splitlines() == [
        "base".ljust(30) + " | law",
        "----".ljust(30) + " | ---",
        "x" * 30 + " | short",
        "x" * 10 + " " * 20 + " |",
        " " * 30 + " |",
        "end" + " " * 27 + " |",
    ]
