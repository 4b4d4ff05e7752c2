"""A tiny model that every test can afford, and rows for it."""

import atexit
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

# before any test imports torch or a hub client
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "TUNELINE_IMAGE"):
    os.environ.pop(_name, None)  # the user's own server is no place for tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# where transformers copies the test models' own code before it imports it
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="tuneline-test-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make golden` passes the first; the others name a KFP to test the client against."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")
    parser.addoption(
        "--kfp-host", metavar="URL", help="a real KFP instead of the tests' own server"
    )
    parser.addoption(
        "--namespace", "--kfp-namespace", metavar="NS", help="where that KFP has several users"
    )
    parser.addoption("--mlflow-uri", metavar="URI", help="of the MLflow of that KFP's pods")
    parser.addoption("--pool", metavar="NAME", default="cpu", help="node pool of end-to-end tests")


@pytest.fixture(scope="session")
def lacking() -> Callable[[str, str], NoReturn]:
    """Skips for what this machine can't have; fails where TUNELINE_REQUIRE, as .ci/run sets it,
    names it, so that "all passed" says that it was there."""

    def end(what: str, reason: str) -> NoReturn:
        if what in os.environ.get("TUNELINE_REQUIRE", "").split():
            pytest.fail(f"TUNELINE_REQUIRE asks for {what}: {reason}", pytrace=False)
        pytest.skip(reason)

    return end


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test writes into the user's cache or talks to the user's MLflow."""
    monkeypatch.setenv("TUNELINE_CACHE", str(tmp_path / "cache"))
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
        "TUNELINE_MLFLOW_TRACKING_URI",
        "TUNELINE_MLFLOW_ARTIFACTS",
        "TUNELINE_CHECKPOINTS",
        "TUNELINE_POOLS",
        "TUNELINE_RUNNER",
        "TUNELINE_WEIGHTS",
    ):
        monkeypatch.setenv(name, "")  # so that what a test leaves set is taken back
        monkeypatch.delenv(name)
    yield


@pytest.fixture(scope="session")
def services() -> ModuleType:
    """The module that starts them."""
    spec = importlib.util.spec_from_file_location(
        "tuneline_services", Path(__file__).parent / "integration/services.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


WEBHOOKS = {
    # they go to this machine, without TLS
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",  # it remembers for so long that there was no webhook
}


@pytest.fixture(scope="session")
def services_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they keep everything."""
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="session")
def services_up(services: ModuleType, services_folder: Path) -> Callable[..., Any]:
    """Starts those that do not run, as the tests want them."""
    return partial(services.up, services_folder, durable=False, mlflow_environment=WEBHOOKS)


@pytest.fixture(scope="session")
def server(
    services: ModuleType,
    services_folder: Path,
    services_up: Callable[..., Any],
    lacking: Callable[[str, str], NoReturn],
) -> Iterator[Any]:
    """A real MLflow: on PostgreSQL, with S3 by SeaweedFS and a login.

    Where a part can't be had, the tests are skipped and say which; in CI they fail.
    """
    if reason := services.missing():
        lacking("services", reason)
    try:
        yield services_up()
    finally:
        services.remove(services_folder)


@pytest.fixture(scope="session")
def chats() -> list[dict[str, list[dict[str, str]]]]:
    """240 short chats with one-word answers that a tiny model can learn."""
    colours = ["red", "blue", "green", "white"]
    fruits = ["apple", "plum", "pear", "fig", "lime"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{fruit} number {number} is {colour}"},
                {"role": "assistant", "content": colour},
            ]
        }
        for number in range(12)
        for fruit in fruits
        for colour in colours
    ]


@pytest.fixture(scope="session")
def chats_file(
    chats: list[dict[str, list[dict[str, str]]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The chats as a JSON-lines file."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="session")
def tiny_model(
    chats: list[dict[str, list[dict[str, str]]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama of two layers with random weights, its own tokenizer and the ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [message["content"] for chat in chats for message in chat["messages"]],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,  # at 0.02 the tied output layer could not tell tokens apart
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_candidate(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Writes a MergedModel and its EvalReport: a function of its name and of what was measured."""

    def make(
        name: str,
        *,
        tuned: float = 0.8,
        passed: bool = True,
        champion: dict[str, Any] | None = None,
        eval_set: str = "rows",
        metric: str = "exact_match",
        higher_is_better: bool = True,
        refused: str = "register",
        champion_rule: str = "better",
    ) -> tuple[Path, Path]:
        from tuneline import artifacts

        base_score = 0.1 if higher_is_better else 2.0
        folder = tmp_path_factory.mktemp(f"candidate-{name}")
        model, report = folder / "model", folder / "report"
        base = {"reference": "tiny", "revision": "", "digest": "sha256:base"}
        adapter = artifacts.digest_of(["adapter", name])
        config = {"method": {"name": "lora"}, "training": {"seed": 1}}
        with artifacts.writing(model) as aside:
            for file in tiny_model.iterdir():
                shutil.copyfile(file, aside / file.name)
            proof = {"max_logit_diff": 1e-5, "mean_kl": 1e-9, "top1_agreement": 1.0}
            (aside / "proof.json").write_text(json.dumps(proof))
            artifacts.seal(
                aside, kind="merged_model", config=config, base_model=base,
                inputs={"adapter": adapter},
            )  # fmt: skip
        result = {
            "metric": metric,
            "higher_is_better": higher_is_better,
            "rows": 120,
            "base": base_score,
            "tuned": tuned,
            "metrics": {metric: {"base": {"score": base_score}, "tuned": {"score": tuned}}},
            "eval_set_digest": artifacts.digest_of(eval_set),
            "verdict": {
                "passed": passed,
                "reasons": [] if passed else ["the gain is too small"],
                "refused": refused,
                "champion": champion_rule,
            },
            "samples": [{"question": "apple number 3 is red"}],
            "champion": champion,
        }
        with artifacts.writing(report) as aside:
            (aside / "report.json").write_text(json.dumps(result))
            artifacts.seal(
                aside, kind="eval_report", config={"gate": {}}, base_model=base,
                inputs={"adapter": adapter, "prepared_dataset": artifacts.digest_of("data")},
            )  # fmt: skip
        return model, report

    return make
