"""What a recipe's tasks name, checked before anything is trained and without lm-eval's own code.

lm-eval imports torch, and reads a task file in a way that imports the Python functions that it
names. Here a file is read as plain YAML. Unless `task_code` allows more, it may only have the keys
of a task that computes nothing by itself, and those values are what lm-eval is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import yaml

from tuneline.errors import RecipeError, did_you_mean
from tuneline.recipe import EvaluationSection, is_task_file

_PLAIN: Final = frozenset(
    (
        "task task_alias tag dataset_path dataset_name dataset_kwargs training_split "
        "validation_split test_split fewshot_split doc_to_text doc_to_target doc_to_choice "
        "description target_delimiter fewshot_delimiter fewshot_config num_fewshot metric_list "
        "output_type generation_kwargs repeats filter_list should_decontaminate "
        "doc_to_decontamination_query gen_prefix metadata"
    ).split()
)
"""Keys of a task file that name no code."""
_OUTPUT_TYPES: Final = ("multiple_choice", "loglikelihood", "generate_until")
_ROLLING: Final = "loglikelihood_rolling"
_LISTED: Final = re.compile(r"^\s*(?:(?:task|group|tag)\s*:|-\s)(.*)$", re.MULTILINE)
_OWN: Final = re.compile(r"^task\s*:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)
_GROUP: Final = re.compile(r"^group\s*:", re.MULTILINE)
_NAME: Final = re.compile(r"[\w.+-]+")
_MOST_INCLUDES: Final = 16


class _Reader(yaml.SafeLoader):
    """Plain YAML; `!function` is refused by name."""


class _CodeReader(yaml.SafeLoader):
    """Plain YAML, in which `!function` is the name behind it."""


def _refuse_function(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    raise ValueError(
        f"names the Python function {node.value}, which would run here: write it as a template, "
        "or set evaluation.task_code: true if you trust the file and what is beside it"
    )


_Reader.add_constructor("!function", _refuse_function)
_CodeReader.add_constructor("!function", lambda loader, node: str(node.value))


def check_tasks(evaluation: EvaluationSection) -> None:
    """Refuse what can't be run.

    Raises:
        RecipeError: with every fault that `faults_of_tasks` finds.
    """
    if faults := faults_of_tasks(evaluation):
        raise RecipeError("evaluation", faults)


def faults_of_tasks(evaluation: EvaluationSection) -> list[str]:
    """Why tasks can't be run: lm-eval is not installed, it has no task of that name, a file is not
    there, is no task, names code, or reads data that is not there; or there is no network, and a
    task's data set was never fetched."""
    faults = []
    installed = _lm_eval_folder()
    if evaluation.tasks and installed is None:
        faults.append(
            "evaluation.tasks needs lm-eval, which is not installed: install tuneline[lm-eval], or "
            "leave tasks out"
        )
    names = [task for task in evaluation.tasks if not is_task_file(task)]
    for task in evaluation.tasks:
        if is_task_file(task):
            try:
                read_task_file(Path(task), allow_code=evaluation.task_code)
            except ValueError as error:
                faults.append(f"evaluation.tasks: {task} {error}")
    if names and installed is not None:
        found = _faults_of(names, installed / "tasks", allow_code=evaluation.task_code)
        faults += [f"evaluation.tasks: {fault}" for fault in found]
    return faults


def read_task_file(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """A local task as lm-eval's configuration, files of `include` merged in.

    Data files are looked for beside the task file, then in the working directory.

    Raises:
        ValueError: the rest of a sentence that starts with the file's name.
    """
    values = _read(path.expanduser(), _CodeReader if allow_code else _Reader, ())
    if not isinstance(values.get("task"), str):
        raise ValueError("has no `task: NAME`; of a group name the tasks themselves")
    if not allow_code:
        _check_plain(values)
    if not values.get("dataset_path") and not allow_code:
        raise ValueError("has no dataset_path, such as json with dataset_kwargs: data_files")
    if not (values.get("test_split") or values.get("validation_split")) and not allow_code:
        raise ValueError("names neither a test_split nor a validation_split")
    return values | {"dataset_kwargs": _located(values.get("dataset_kwargs") or {}, path.parent)}


def _read(path: Path, reader: type[yaml.SafeLoader], seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen or len(seen) > _MOST_INCLUDES:
        raise ValueError(f"includes itself by way of {path}")
    try:
        # the reader is a SafeLoader
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=reader)
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror}: {path}): name a local file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of {path})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"is not a task: {path} must be a mapping")
    included = values.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read(path.parent / str(name), reader, (*seen, path))
    return merged | values


def _check_plain(values: Mapping[str, Any]) -> None:
    trust = "set evaluation.task_code: true if you trust the file and what is beside it"
    if others := sorted(values.keys() - _PLAIN):
        raise ValueError(
            f"has keys that run code or that no task has ({', '.join(others)}); allowed are "
            f"{', '.join(sorted(_PLAIN))}: leave the others out, or {trust}"
        )
    kind = values.get("output_type", "generate_until")
    if kind not in (*_OUTPUT_TYPES, _ROLLING):
        raise ValueError(
            f"has output_type {kind!r}; allowed are {', '.join((*_OUTPUT_TYPES, _ROLLING))}"
        )
    if not isinstance(values.get("dataset_kwargs") or {}, dict):
        raise ValueError("has dataset_kwargs that are no mapping")
    if (values.get("dataset_kwargs") or {}).get("trust_remote_code"):
        raise ValueError("asks for trust_remote_code, which is never given: leave it out")
    metrics = values.get("metric_list") or []
    if not isinstance(metrics, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("metric"), str) for entry in metrics
    ):
        raise ValueError("has a metric_list that is not a list of `metric: NAME`")
    for entry in metrics:
        if entry.get("hf_evaluate"):
            raise ValueError(
                f"takes the metric {entry['metric']} from the hub (hf_evaluate), which would run "
                f"code from there: choose one of lm-eval's own, or {trust}"
            )


def _located(kwargs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def found(name: Any) -> str:
        text = str(name)
        if "://" in text:
            return text
        for place in (folder / Path(text).expanduser(), Path(text).expanduser()):
            if any(place.parent.glob(place.name)) if "*" in place.name else place.is_file():
                return str(place.absolute())
        raise ValueError(
            f"reads {text}, which is neither in {folder.absolute()} nor in the working directory"
        )

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: located(names) for split, names in value.items()}
        if isinstance(value, list):
            return [found(name) for name in value]
        return found(value)

    if "data_files" not in kwargs:
        return dict(kwargs)
    return {**kwargs, "data_files": located(kwargs["data_files"])}


def _lm_eval_folder() -> Path | None:
    spec = find_spec("lm_eval")  # of a top-level package: finds it without importing it
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def of_lm_eval(name: str) -> str:
    """The file of one of lm-eval's tasks; of a group or tag the name itself."""
    folder = _lm_eval_folder()
    path = None if folder is None else _listed(folder / "tasks").get(name)
    return str(path or name)


def _listed(folder: Path) -> dict[str, Path | None]:
    """Every name in lm-eval's task files -> the file of that task, None for groups and tags."""
    listed: dict[str, Path | None] = {}
    for path in sorted(folder.rglob("*.yaml")):  # of two, lm-eval takes the first as well
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in _LISTED.findall(text):
            for name in _NAME.findall(line):
                listed.setdefault(name, None)
        own = _OWN.search(text)
        if own and not _GROUP.search(text) and listed[own[1]] is None:
            listed[own[1]] = path
    return listed


def _faults_of(names: list[str], folder: Path, *, allow_code: bool) -> Iterator[str]:
    """Of names that no task file of lm-eval has, that run code, or whose data can't be had."""
    listed = _listed(folder)
    for name in names:
        if name not in listed:
            hint = did_you_mean(name, [known for known, path in listed.items() if path])
            yield (
                f"lm-eval has no task {name}: give one of its names (`lm-eval ls tasks` lists "
                f"them) or a .yaml file.{hint}"
            )
        elif (path := listed[name]) is not None:
            try:
                values = _read(path, _CodeReader, ())
            except ValueError:  # of a form that only lm-eval knows
                continue
            if values.get("unsafe_code") and not allow_code:
                yield unsafe(name)
            if data := _missing_data(values.get("dataset_path")):
                yield f"{unreachable(name)} (it is {data}, and HF_HUB_OFFLINE is set)"


def unsafe(task: str) -> str:
    """The sentence for a task that runs what a model wrote."""
    return (
        f"task {task} runs code that the model writes: leave it out, or set evaluation.task_code: "
        "true where nothing can be harmed by that"
    )


def unreachable(task: str) -> str:
    """The sentence for a task whose data set is not on this machine and can't be fetched."""
    return (
        f"task {task}: its data set is not in the local cache and can't be fetched from here: load "
        "the task once where there is a network and bring HF_HOME along, or name a .yaml file with "
        "local data_files"
    )


def _missing_data(dataset: Any) -> str:
    """The hub's data set itself, if there is no network by choice and no copy of it; else empty."""
    if not any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return ""
    if not isinstance(dataset, str) or "/" not in dataset or Path(dataset).exists():
        return ""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    owner, _, name = dataset.partition("/")
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    fetched = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"datasets--{owner}--{name}"
    # the rest of a prepared one's name is written in its own way
    there = fetched.is_dir() or any(prepared.glob(f"{owner}___*"))
    return "" if there else dataset
