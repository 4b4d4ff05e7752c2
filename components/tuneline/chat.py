"""Talk to a base model, to several adapters on it, and to whole models.

The base is loaded once for each precision that its adapters were trained on. Adapters of one type
lie beside each other on it and are switched; peft can't hold two types at once, so that another
type is put on after the one before was taken off, which reads a file of some MB. Each speaker has
a conversation of its own, rendered by its model's chat template as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.base_model import CODE_PIN, BaseModel
from tuneline.errors import RegistryError, UsageError, did_you_mean
from tuneline.finetune.methods.method import Quantization
from tuneline.recipe import method_of, method_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tuneline.data_prep.chat import Renderer

BASE: Final = "base"
MODEL: Final = "model"
REGISTERED: Final = "models:/"


@dataclass
class _Speaker:
    """Who answers, and what was said so far."""

    tokenizer: Any
    renderer: Renderer
    take: Any
    """A function that gives a context in which the model computes as this speaker."""
    messages: list[dict[str, str]] = field(default_factory=list)


class _Stand:
    """A base in one precision, and the adapters that were trained on it."""

    def __init__(self, base: BaseModel, quantization: Quantization | None) -> None:
        self._base = base
        self._quantization = quantization
        self._model: PreTrainedModel | PeftModel | None = None
        self._type = ""

    def _loaded(self) -> PreTrainedModel | PeftModel:
        from tuneline.finetune.load import load_base

        if self._model is None:
            self._model = load_base(
                self._base.path,
                trust_code=self._base.trusts_code,
                quantization=self._quantization,
            )
        return self._model

    @contextmanager
    def alone(self) -> Iterator[Any]:
        """The base without any adapter."""
        from peft import PeftModel

        model = self._loaded()
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            yield model

    @contextmanager
    def with_adapter(self, name: str, adapter: Artifact) -> Iterator[Any]:
        """The base with one adapter.

        Raises:
            ArtifactError: the adapter's tensors are not those that the model needs of it.
            MethodError: the adapter is for a base of another shape.
        """
        from peft import PeftModel

        method = method_of(method_settings(adapter.manifest.config["method"]))
        kind = str(adapter.read_json("adapter_config.json")["peft_type"])
        model = self._loaded()
        if isinstance(model, PeftModel) and self._type != kind:
            model = self._taken_off(model)
        if not isinstance(model, PeftModel) or name not in model.peft_config:
            model = method.load(model, str(adapter.path), name)
        self._model, self._type = model, kind
        model.set_adapter(name)
        yield model

    def _taken_off(self, model: PeftModel) -> PreTrainedModel:
        bare: Any
        if model.active_peft_config.is_prompt_learning:
            bare = model.get_base_model()
        else:
            bare = model.unload()
            if hasattr(bare, "peft_config"):  # peft would take it for one that still has adapters
                del bare.peft_config
        self._model, self._type = bare, ""
        return bare


class Chat:
    """Speakers by name, in the order in which they were added.

    Args:
        system: what every conversation begins with; empty for the chat template's own beginning.
        max_new_tokens: longest answer.
    """

    def __init__(self, *, system: str = "", max_new_tokens: int = 256) -> None:
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._base: BaseModel | None = None
        self._base_reference = ""
        self._stands: dict[Quantization | None, _Stand] = {}
        self._speakers: dict[str, _Speaker] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of all speakers."""
        return list(self._speakers)

    def add_base(self, reference: str) -> None:
        """Let the base model speak, and adapters stand on it.

        Raises:
            ModelError: it can't be used.
            DataError: it has no chat template.
        """
        self._base, self._base_reference = base_model.resolve(reference), reference
        self._add(BASE, self._base, lambda: self._stand_of_base().alone())

    def add_adapter(self, name: str, folder: Path) -> None:
        """Let an adapter speak; full weights stand alone.

        Raises:
            ArtifactError: not an adapter, damaged, or trained on another base.
            UsageError: the name is taken.
        """
        from tuneline.evaluate.evaluate import check_lineage

        assert self._base is not None, "add_base comes first"
        adapter = artifacts.load(folder, "adapter")
        check_lineage(adapter, self._base, None)
        settings = method_settings(adapter.manifest.config["method"])
        if method_of(settings).stored_as == "model":
            self._add(name, self._base, _whole(adapter.path, trust_code=self._base.trusts_code))
            return
        stand = self._stand(settings.quantization)
        # peft mistakes some names, lora among them, for parts of the tensors' names
        known_as = f"speaker{len(self._speakers)}"
        self._add(name, self._base, lambda: stand.with_adapter(known_as, adapter))

    def add_model(self, reference: str) -> None:
        """Let a MergedModel or PackagedModel speak: its folder, or a version in the registry.

        Args:
            reference: `DIR`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, and `#code=sha256:...`
                behind it if merged weights have code of their own. A package stands on the base of
                `add_base`, if there is one, else on the one that it names.

        Raises:
            ArtifactError: neither of both, damaged, or a package of another base.
            RegistryError: no such version, or its files are not the registered ones.
            ModelError: its code is not pinned, or not the pinned one.
        """
        from tuneline.data_prep.chat import Renderer, chat_format
        from tuneline.merge.package import load_packaged
        from tuneline.register.package import package_of

        place, _, pin = reference.partition(CODE_PIN)
        if place.startswith(REGISTERED):
            found = self._stack.enter_context(_registered(place))
        else:
            found = artifacts.load(Path(place), package_of(Path(place)).kind)
        if found.manifest.kind == "packaged_model":
            model, tokenizer = load_packaged(found.path, base_model=self._base_reference)
            renderer = Renderer(chat_format(tokenizer, found.path))
            self._speakers[MODEL] = _Speaker(tokenizer, renderer, lambda: nullcontext(model))
            return
        weights = base_model.resolve(f"{found.path}{CODE_PIN}{pin}" if pin else str(found.path))
        self._add(MODEL, weights, _whole(weights.path, trust_code=weights.trusts_code))

    def _stand(self, quantization: Quantization | None) -> _Stand:
        assert self._base is not None
        return self._stands.setdefault(quantization, _Stand(self._base, quantization))

    def _stand_of_base(self) -> _Stand:
        # a base that is there for 4-bit adapters only may not fit in 16
        return next(iter(self._stands.values())) if self._stands else self._stand(None)

    def _add(self, name: str, model: BaseModel, take: Any) -> None:
        from tuneline.data_prep.chat import Renderer, chat_format, load_tokenizer

        if name in self._speakers:
            raise UsageError(f"two speakers are called '{name}': give each another name")
        tokenizer = load_tokenizer(str(model.path), trust_code=model.trusts_code)
        renderer = Renderer(chat_format(tokenizer, model.path))
        self._speakers[name] = _Speaker(tokenizer, renderer, take)

    def load(self) -> None:
        """Load everything once, so that what can't be loaded shows before the first question."""
        for speaker in self._speakers.values():
            with speaker.take():
                pass

    def ask(self, text: str, names: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
        """Put a question to some speakers, or to all; gives each one's name and answer.

        Raises:
            UsageError: a name is nobody's.
            DataError: the conversation is longer than the model's context, or its template
                refuses it.
        """
        from tuneline.evaluate.generate import generate_answers

        self.check(names)
        for name in names or self.names:
            speaker = self._speakers[name]
            messages = speaker.messages or (
                [{"role": "system", "content": self._system}] if self._system else []
            )
            messages = [*messages, {"role": "user", "content": text}]
            prompt = speaker.renderer.template_text(messages, prompt=True)
            with speaker.take() as model:
                (answer,) = generate_answers(
                    model,
                    speaker.tokenizer,
                    [prompt],
                    batch_size=1,
                    batch_tokens=1,
                    max_new_tokens=self._max_new_tokens,
                    on_batch=lambda done, total: None,
                )
            speaker.messages = [*messages, {"role": "assistant", "content": answer.text}]
            yield name, answer.text if answer.ended else f"{answer.text} [cut]"

    def check(self, names: Sequence[str]) -> None:
        """Refuse names that are nobody's.

        Raises:
            UsageError: there are some.
        """
        for name in names:
            if name not in self._speakers:
                raise UsageError(
                    f"nobody here is called '{name}'; there are {', '.join(self.names)}."
                    f"{did_you_mean(name, self.names)}"
                )

    def reset(self) -> None:
        """Forget what was said."""
        for speaker in self._speakers.values():
            speaker.messages = []


def _whole(folder: Path, *, trust_code: bool) -> Any:
    """A model that stands alone, loaded when it first speaks."""
    loaded: list[Any] = []

    @contextmanager
    def take() -> Iterator[Any]:
        from tuneline.finetune.load import load_base

        if not loaded:
            loaded.append(load_base(folder, trust_code=trust_code))
        yield loaded[0]

    return take


@contextmanager
def _registered(reference: str) -> Iterator[Artifact]:
    """The model of a registered version, verified against what was registered."""
    from tuneline.register import tags
    from tuneline.register.package import MODEL as FOLDER
    from tuneline.register.package import package_of
    from tuneline.register.verify import fetched, label
    from tuneline.tracking import mlflow_errors, open_client

    name, alias, number = _parts(reference)
    client = open_client()
    with mlflow_errors(f"looking for {reference}"):
        version = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, number)
        )
    with fetched(client, version) as folder:
        model = artifacts.load(folder / FOLDER, package_of(folder / FOLDER).kind)
        if model.digest != (stated := version.tags.get(tags.MODEL_DIGEST)):
            raise RegistryError(
                f"{label(version)}: its files ({model.digest[:19]}) are not the registered ones "
                f"({str(stated)[:19]}): register the model again"
            )
        yield model


def _parts(reference: str) -> tuple[str, str, str]:
    rest = reference.removeprefix(REGISTERED)
    name, _, alias = rest.partition("@")
    number = ""
    if not alias:
        name, _, number = rest.partition("/")
    if not name or not (alias or number.isdecimal()):
        raise UsageError(
            f"'{reference}' is not of the form {REGISTERED}NAME@ALIAS or {REGISTERED}NAME/VERSION"
        )
    return name, alias, number


def as_json(answers: Sequence[tuple[str, str]]) -> str:
    """Answers by speaker."""
    return json.dumps(dict(answers), ensure_ascii=False, indent=2)
