"""Tiny random models of the families that every method must work on."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
NATIVE = ("llama", "qwen2", "qwen3", "glm", "glm4")
OWN_CODE = ("chatglm_shaped", "baichuan_shaped")
"""Models that bring their own Python code, with the parts and names of those families."""
ARCHITECTURES = NATIVE + OWN_CODE


def _native(family: str, vocab_size: int) -> object:
    import transformers

    config = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "glm": transformers.GlmConfig,
        "glm4": transformers.Glm4Config,
    }[family](
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def _with_own_code(family: str, vocab_size: int, folder: Path) -> object:
    from transformers import AutoConfig, AutoModelForCausalLM

    stem = "".join(part.capitalize() for part in family.split("_")).replace("Chatglm", "ChatGLM")
    for file in (FIXTURES / family).glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    config = {
        "model_type": family,
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{family}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{family}.{stem}ForCausalLM",
        },
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "padded_vocab_size" if family == "chatglm_shaped" else "vocab_size": vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)


@pytest.fixture(scope="session")
def model_reference(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """The reference of a family's tiny model, as a recipe would name it."""

    @cache
    def reference(family: str) -> str:
        import torch

        from tuneline.base_model import CODE_PIN, digest_of_code

        if family == "llama":
            return str(tiny_model)
        folder = tmp_path_factory.mktemp(family)
        for file in tiny_model.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
        shutil.copyfile(tiny_model / "chat_template.jinja", folder / "chat_template.jinja")
        vocab_size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
        torch.manual_seed(0)
        if family in NATIVE:
            model = _native(family, vocab_size)
        else:
            model = _with_own_code(family, vocab_size, folder)
            config = (folder / "config.json").read_text()
        model.save_pretrained(folder)  # type: ignore[attr-defined]
        if family in NATIVE:
            return str(folder)
        (folder / "config.json").write_text(config)
        return f"{folder}{CODE_PIN}{digest_of_code(folder)}"

    return reference
