"""Base reference + adapter + the loader that serves them: for what has no form as plain weights.

A change that is not linear in the weights (prompt tuning, bottleneck layers), or has no place in
the base's architecture (biases where there were none), is not written into weights. The artifact
then names the base that it stands on by reference, revision and digest, holds the adapter and the
tokenizer, and says which packages load it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts, base_model
from tuneline.artifacts import MANIFEST, Artifact
from tuneline.base_model import DEMO, BaseModel
from tuneline.data_prep.chat import load_tokenizer
from tuneline.finetune.methods.method import Quantization
from tuneline.merge.model_card import card
from tuneline.object_store import is_remote
from tuneline.recipe import method_of, method_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOADER: Final = "loader.json"
_PACKAGES: Final = {
    "peft": ("torch", "transformers", "peft", "safetensors"),
    "peft with tuneline": ("torch", "transformers", "peft", "safetensors", "tuneline"),
}
_OF_THE_TOKENIZER: Final = ("token", "vocab", "merges", "chat_template", "special", "LICENSE")
_LONGEST_ANSWER: Final = 1024
"""Tokens, where a caller of the served model names no `max_new_tokens`."""
_BATCH_TOKENS: Final = 16384


def write_package(
    base: BaseModel, adapter: Artifact, reason: str, folder: Path, name: str, facts: dict[str, Any]
) -> None:
    """Fill `folder`.

    Args:
        base: what the adapter stands on.
        adapter: with its method in the manifest.
        reason: why it is not merged.
        folder: to write into.
        name: that the folder will have.
        facts: more for the model card.
    """
    settings = method_settings(adapter.manifest.config["method"])
    loader = method_of(settings).loader
    packages = [*_PACKAGES[loader], *(["bitsandbytes"] if settings.quantization else [])]
    if _needs_tuneline(base) and "tuneline" not in packages:
        packages.append("tuneline")
    for file in adapter.path.iterdir():
        if file.is_file() and file.name not in (MANIFEST, "history.jsonl"):
            shutil.copyfile(file, folder / file.name)
    for file in base.path.iterdir():
        wanted = file.name.startswith(_OF_THE_TOKENIZER) and file.suffix != ".safetensors"
        if wanted and file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if base.trusts_code:
        for file in base.path.rglob("*.py"):
            (folder / file.relative_to(base.path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(base.path))
    quantization = settings.quantization
    text = json.dumps(
        {
            "base_model": base.identity(),
            "method": settings.name,  # pyright: ignore[reportAttributeAccessIssue]  # each has one
            "loader": loader,
            "packages": {package: version(package) for package in packages},
            "quantization": {"type": "nf4", "double": quantization.double}
            if quantization
            else None,
            "not_merged": reason,
        },
        indent=2,
    )
    (folder / LOADER).write_text(text + "\n", encoding="utf-8")
    code = loading_code(base, name, quantization, with_tuneline="tuneline" in packages)
    (folder / "README.md").write_text(
        card(base, adapter, facts, code=code, note=reason, is_adapter=True), encoding="utf-8"
    )


def loading_code(
    base: BaseModel, name: str, quantization: Quantization | None, *, with_tuneline: bool
) -> str:
    """Python that loads the folder `name` from where it lies."""
    if with_tuneline:
        reference = f"{base.reference}{base_model.CODE_PIN}{base.code}" if base.code else (
            base.reference
        )  # fmt: skip
        return (
            "from tuneline.merge.package import load_packaged\n"
            f"model, tokenizer = load_packaged({_quoted(name)}, base_model={_quoted(reference)})\n"
        )
    revision = f", revision={_quoted(base.revision)}" if base.revision else ""
    lines = ["from peft import PeftModel"]
    options = ""
    if quantization is None:
        lines.append("from transformers import AutoModelForCausalLM, AutoTokenizer")
    else:
        lines.append("from transformers import AutoModelForCausalLM, AutoTokenizer, "
                     "BitsAndBytesConfig")  # fmt: skip
        lines.append(
            'four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={quantization.double})"
        )
        options = ", quantization_config=four_bit"
    lines += [
        f"base = AutoModelForCausalLM.from_pretrained({_quoted(base.name)}{revision}{options})",
        f"model = PeftModel.from_pretrained(base, {_quoted(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A Python literal: what names a folder does not become code."""
    return json.dumps(text)


def _needs_tuneline(base: BaseModel) -> bool:
    # nobody else knows the demo's model, reads a store, or checks the pin of a model's own code
    return bool(base.code) or base.reference == DEMO or is_remote(base.reference)


def load_packaged(
    folder: str | Path, *, base_model: str = ""
) -> tuple[PeftModel | PreTrainedModel, Any]:
    """The model and tokenizer of a packaged artifact, verified, on the base that it names.

    Args:
        folder: of kind `packaged_model`.
        base_model: where its base is; another than the adapter was trained on is refused. Empty:
            as the package names it, or where this machine's cache has it noted.

    Raises:
        ArtifactError: the folder is damaged, or the base is another.
        ModelError: the base can't be loaded.
    """
    from tuneline.base_model import digest_of_code, resolve, resolve_again
    from tuneline.evaluate.evaluate import check_lineage
    from tuneline.finetune.load import load_tuned

    packaged = artifacts.load(Path(folder), "packaged_model")
    base = resolve(base_model) if base_model else resolve_again(packaged.manifest.base_model)
    check_lineage(packaged, base, None)
    trusted = base.trusts_code and digest_of_code(packaged.path) == base.code
    tokenizer = load_tokenizer(str(folder), trust_code=trusted)
    return load_tuned(base, packaged).eval(), tokenizer


class Served:
    """A packaged model behind MLflow's `python_function`: questions in, answers out."""

    def __init__(self, folder: str, base_model: str = "") -> None:
        self._model, self._tokenizer = load_packaged(folder, base_model=base_model)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Greedy answers.

        Args:
            model_input: a text, a list of texts, or a data frame whose first column has them;
                each is what a user says.
            params: `max_new_tokens` of each answer.
        """
        from tuneline.evaluate.generate import generate_answers

        if hasattr(model_input, "iloc"):
            model_input = model_input.iloc[:, 0].tolist()
        questions = [model_input] if isinstance(model_input, str) else list(model_input)
        prompts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        answers = generate_answers(
            self._model,
            self._tokenizer,
            prompts,
            batch_size=8,
            batch_tokens=_BATCH_TOKENS,
            max_new_tokens=int((params or {}).get("max_new_tokens", _LONGEST_ANSWER)),
            on_batch=lambda done, total: None,
        )
        return [answer.text for answer in answers]


def _load_pyfunc(  # pyright: ignore[reportUnusedFunction]  # the name that MLflow calls
    path: str, model_config: Mapping[str, Any] | None = None
) -> Served:
    # MLflow's caller may say in model_config where the base is
    return Served(path, base_model=str((model_config or {}).get("base_model", "")))
