"""What a recipe names: looked for, not read. Nothing is downloaded or converted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import base_model, object_store
from tuneline.base_model import CODE_PIN, DEMO, HUB_SCHEME
from tuneline.errors import TunelineError
from tuneline_pipelines.doctor.finding import Finding, error, ok

if TYPE_CHECKING:
    from tuneline.recipe import EvaluationSection, Recipe, Source

_HUB_SECONDS: Final = 5


def checks(recipe: Recipe, *, offline: bool = False) -> Iterator[Finding]:
    """Base model, data and what evaluation needs.

    Args:
        recipe: without faults.
        offline: look at nothing on other machines.
    """
    yield _base(recipe.model.base_model, offline=offline)
    sources = [*recipe.data.train, *recipe.data.test, *recipe.data.evaluation_sets]
    for source in {source.path: source for source in sources}.values():
        yield _source(source, offline=offline)
    yield from _evaluation(recipe.evaluation)


def _base(reference: str, *, offline: bool) -> Finding:
    name = f"base model {reference.partition(CODE_PIN)[0]}"
    plain = reference.partition(CODE_PIN)[0]
    try:
        if plain == DEMO:
            from tuneline.demo import model

            if model.is_converted(base_model.cache_dir()):
                return ok(name, "in the cache")
            return ok(name, f"in {model.package_folder()}, converted on first use")
        if plain.startswith(HUB_SCHEME):
            return _hub(name, plain.removeprefix(HUB_SCHEME), "model", offline=offline)
        if object_store.is_remote(plain):
            if offline:
                return ok(name, "not looked for")
            found = object_store.Folder(plain, hurried=True).entries()
            if "config.json" not in found:
                return error(name, "no config.json below it", "name the prefix that it lies below")
            return ok(
                name, f"{len(found)} objects, {_gigabytes(e['Size'] for e in found.values())}"
            )
        path = Path(plain).expanduser()
        if not path.is_dir():
            return error(name, "no such folder", "name a local folder, or bring it there")
        base_model.check_folder(path, plain)
        files = base_model.weight_files(path)
        if missing := [file.name for file in files if not file.is_file()]:
            return error(
                name, f"{missing[0]} is missing, which the index names", "copy the model again"
            )
        return ok(name, _gigabytes(file.stat().st_size for file in files))
    except TunelineError as fault:
        return error(name, str(fault))


def _source(source: Source, *, offline: bool) -> Finding:
    from tuneline.data_prep import sources

    name, path = f"data {source.path}", source.path
    if path in sources.DEMO_SOURCES:
        return ok(name, "generated")
    if path.startswith(HUB_SCHEME):
        return _hub(name, path.removeprefix(HUB_SCHEME), "dataset", offline=offline)
    if "://" in path and offline:
        return ok(name, "not looked for")
    try:
        found = sources.files(source)
        if "://" not in path:
            for _, opened in found:
                with opened() as file:
                    file.read(1)
    except TunelineError as fault:
        return error(name, str(fault))
    except OSError as fault:
        return error(
            name, f"can't be read ({fault.strerror or fault})", "check the path and who may read it"
        )
    return ok(name, f"{len(found)} file{'s' if len(found) != 1 else ''}")


def _hub(name: str, reference: str, kind: str, *, offline: bool) -> Finding:
    repository, _, revision = reference.partition("@")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository):
        return error(name, "not of the form hf://org/name@commit")
    if kind == "model" and not re.fullmatch(r"[0-9a-f]{40}", revision):
        return error(name, f"revision '{revision}' is not pinned", "give the full 40-digit commit")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    folder = os.environ.get("HF_HUB_CACHE") or base_model.cache_dir() / "hub"
    if kind == "model" and isinstance(
        try_to_load_from_cache(repository, "config.json", cache_dir=folder, revision=revision), str
    ):
        return ok(name, "in the cache")
    if constants.HF_HUB_OFFLINE and kind == "model":
        return error(
            name,
            "not in the cache, and HF_HUB_OFFLINE is set",
            "unset it, or bring the model there with `tuneline fetch-model`",
        )
    if offline or constants.HF_HUB_OFFLINE:
        return ok(name, "not looked for")
    return _on_hub(
        name,
        repository,
        kind,
        lambda: (
            HfApi().model_info(repository, revision=revision, timeout=_HUB_SECONDS)
            if kind == "model"
            else HfApi().dataset_info(repository, revision=revision or None, timeout=_HUB_SECONDS)
        ),
    )


def _on_hub(name: str, repository: str, kind: str, ask: Callable[[], Any]) -> Finding:
    from httpx2 import TransportError
    from huggingface_hub import auth_check
    from huggingface_hub.errors import HfHubHTTPError

    try:
        gated = bool(getattr(ask(), "gated", False))
        if gated:
            auth_check(repository, repo_type=kind)
    except HfHubHTTPError as fault:
        status = fault.response.status_code
        what = {
            401: "not there, or not for this login",
            403: "gated, and this login has no access",
            404: "no such repository or revision",
        }
        return error(
            name,
            what.get(status, f"the hub answers {status}"),
            "check the name and the revision; for what is gated set HF_TOKEN",
        )
    except (OSError, TransportError) as fault:
        return error(
            name,
            f"the hub can't be reached ({fault})",
            "check the network, or use a copy in a folder or object store",
        )
    return ok(name, f"on the hub{', gated, with access' if gated else ''}")


def _evaluation(section: EvaluationSection) -> Iterator[Finding]:
    if section.tasks and find_spec("lm_eval") is None:
        yield error(
            "evaluation.tasks", "lm_eval is not installed", "pip install 'tuneline[lm-eval]'"
        )
    if section.engine == "vllm" and find_spec("vllm") is None:
        yield error(
            "evaluation.engine",
            "vllm is not installed",
            "use an image that has it, or engine: transformers",
        )
    for path in (*section.forgetting_sets.values(), *_task_files(section)):
        if not Path(path).is_file():
            yield error("evaluation", f"{path} is no file", "check the path")


def _task_files(section: EvaluationSection) -> list[str]:
    from tuneline.recipe import is_task_file

    return [task for task in section.tasks if is_task_file(task)]


def _gigabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e9:.2f} GB"
