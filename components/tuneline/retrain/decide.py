"""Whether a retraining has anything to do.

The content key of the work is the digest of the data, the recipe, the base model and the image.
Work that has been done is not done again, work that another run is doing is left to it, and data
that changed less than the recipe's triggers ask for waits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tuneline.artifacts import digest_of, digest_of_file
from tuneline.evaluate.task_files import read_task_file
from tuneline.images import CPU_IMAGE_VARIABLE
from tuneline.progress import report
from tuneline.recipe import (
    EvaluationSection,
    Recipe,
    RetrainSection,
    is_task_file,
    task_label,
)
from tuneline.register import tags
from tuneline.retrain import ledger
from tuneline.retrain.fingerprints import rows_added
from tuneline.retrain.profile import Profile, drift_between

if TYPE_CHECKING:
    from mlflow import MlflowClient

Action = Literal["train", "promote", "nothing"]
NO_VERSION: Final = 0
_NOT_DATA: Final = "recipe, base model or image changed"


@dataclass(frozen=True)
class Decision:
    """What a run does."""

    action: Action
    """`promote`: the work was done up to its registration, and the run that did it is lost."""
    reason: str
    key: str
    version: int = NO_VERSION
    """To promote, or that the same work has given; 0 for none."""


@dataclass(frozen=True)
class Work:
    """What a retraining is made of, but for its data."""

    digest: str

    def key(self, digests: Mapping[str, str]) -> str:
        """The content key of this work on data of these digests."""
        return digest_of({"work": self.digest, "data": dict(sorted(digests.items()))})


def work_of(recipe: Recipe, base_key: str) -> Work:
    """The work of a recipe.

    What only says where it is recorded, or when it is due, is left out.

    Args:
        recipe: resolved.
        base_key: of `base_model.content_key`.
    """
    values = recipe.model_dump(mode="json", exclude={"retrain", "compare"})
    del values["registry"]["experiment"]
    del values["model"]  # its content counts, wherever it lies
    images = [os.environ.get(name, "") for name in ("TUNELINE_IMAGE", CPU_IMAGE_VARIABLE)]
    return Work(
        digest_of(
            {
                "recipe": values,
                "evaluated_with": _files_of(recipe.evaluation),
                "base_model": base_key,
                "images": images,
            }
        )
    )


def _files_of(evaluation: EvaluationSection) -> dict[str, str]:
    """Digest of each local file that the evaluation reads, beside the data."""
    digests = {
        name: digest_of_file(Path(path).expanduser())
        for name, path in evaluation.forgetting_sets.items()
    }
    for task in filter(is_task_file, evaluation.tasks):
        values = read_task_file(Path(task), allow_code=evaluation.task_code)
        named = values["dataset_kwargs"].pop("data_files", [])
        found = [
            digest_of_file(file)
            for pattern in _strings_in(named)
            for file in sorted(Path(pattern).parent.glob(Path(pattern).name))
        ]
        digests[task_label(task)] = digest_of([json.dumps(values, default=str), found])
    return digests


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings_in(inner)
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _strings_in(inner)


def decide(
    client: MlflowClient,
    recipe: Recipe,
    profile: Profile,
    work: Work,
    run_id: str,
    mlflow_run_id: str,
) -> Decision:
    """What this run has to do; where it has to train, it is written down that it does.

    Args:
        client: of the tracking server.
        recipe: resolved.
        profile: of its data now.
        work: of the recipe.
        run_id: of the pipeline run.
        mlflow_run_id: of this step.
    """
    name, key = recipe.registry.model_name, work.key(profile.digests)
    entries = ledger.read(client, name)
    if not any(entry.run_id == run_id and entry.key == key for entry in entries):
        if (known := _known(client, name, entries, key)) is not None:
            return known
        if waits := _waits(client, recipe, profile, work, entries):
            return Decision("nothing", waits, key)
        entries = ledger.append(client, name, key, run_id, mlflow_run_id)
    held = ledger.holder(client, entries, key)
    if held is not None and held[0].run_id != run_id:
        return Decision("nothing", _elsewhere(held), key)
    return Decision("train", _why(client, recipe, profile, work, entries), key)


def _known(
    client: MlflowClient, name: str, entries: list[ledger.Entry], key: str
) -> Decision | None:
    held = ledger.holder(client, entries, key)
    version = version_of(client, name, key)
    if held is None:
        if version == NO_VERSION:
            return None
        if _was_judged(client, name, version):
            return Decision(
                "nothing", f"made before: {_outcome(client, name, version)}", key, version
            )
        return Decision(
            "promote",
            f"{name} version {version} was made of exactly this, and its run did not get to the "
            "promotion",
            key,
            version,
        )
    reason = _elsewhere(held)
    if held[1] == "done":
        outcome = _outcome(client, name, version) if version else "nothing was registered"
        reason += f": {outcome}. Data, recipe, base model and image are unchanged"
    return Decision("nothing", reason, key, version)


def _elsewhere(held: tuple[ledger.Entry, ledger.State]) -> str:
    entry, state = held
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(entry.written_at_ms / 1000))
    verb = "did this work" if state == "done" else "is at this work"
    return f"run {entry.run_id[:8]} of {day} {verb}"


def version_of(client: MlflowClient, name: str, key: str) -> int:
    """The version that the work of `key` has given, or 0."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{tags.RETRAIN_KEY}` = '{key}'")
    return min((int(version.version) for version in found), default=NO_VERSION)


def _was_judged(client: MlflowClient, name: str, number: int) -> bool:
    """Whether the version was promoted, refused or rolled back before."""
    from tuneline.register import history

    return any(entry.version == number for entry in history.read(client, name).entries)


def _outcome(client: MlflowClient, name: str, number: int) -> str:
    version = client.get_model_version(name, str(number))
    aliases = [
        alias
        for alias, held in client.get_registered_model(name).aliases.items()
        if int(held) == number
    ]
    verdict = version.tags.get(tags.GATE, "unknown")
    return f"{name} version {number}, gate {verdict}" + (
        f", alias {', '.join(sorted(aliases))}" if aliases else ""
    )


def _last_done(client: MlflowClient, entries: list[ledger.Entry]) -> ledger.Entry | None:
    """The newest retraining that ended well."""
    return next((e for e in reversed(entries) if ledger.state_of(client, e) == "done"), None)


def _waits(
    client: MlflowClient,
    recipe: Recipe,
    profile: Profile,
    work: Work,
    entries: list[ledger.Entry],
) -> str:
    """Why changed data is not trained on yet; empty if it is time."""
    triggers = recipe.retrain
    if not triggers.any or (last := _last_done(client, entries)) is None:
        return ""
    before = _profile_of(client, last)
    if before is None or work.key(before.digests) != last.key:
        return ""
    measured = _measured(client, recipe, before, profile)
    if any(fired for _, _, fired in measured):
        return ""
    found = ", ".join(f"{what} {value}" for what, value, _ in measured)
    return f"the data changed, and no trigger is met: {found}"


def _measured(
    client: MlflowClient, recipe: Recipe, before: Profile, now: Profile
) -> list[tuple[str, str, bool]]:
    """Each trigger that is set, what it stands at, and whether it is met."""
    triggers: RetrainSection = recipe.retrain
    measured = []
    if triggers.min_new_rows is not None:
        if before.fingerprints is None or now.fingerprints is None:
            new = max(now.rows - before.rows, 0)
        else:
            new = rows_added(before.fingerprints, now.fingerprints)
        measured.append(
            ("new rows", f"{new:,} of {triggers.min_new_rows:,}", new >= triggers.min_new_rows)
        )
    if triggers.min_drift is not None:
        drift = drift_between(before, now)
        measured.append(
            ("drift", f"{drift:.3f} of {triggers.min_drift:g}", drift >= triggers.min_drift)
        )
    if triggers.max_champion_age_days is not None:
        age = _champion_age_days(client, recipe.registry.model_name)
        told = (
            "none yet" if age is None else f"{age:.1f} of {triggers.max_champion_age_days:g} days"
        )
        met = age is None or age >= triggers.max_champion_age_days
        measured.append(("champion's age", told, met))
    return measured


def _champion_age_days(client: MlflowClient, name: str) -> float | None:
    from tuneline.register import history

    move = history.read(client, name).last_move
    return None if move is None else (time.time() - move.written_at_ms / 1000) / 86400


def _why(
    client: MlflowClient,
    recipe: Recipe,
    profile: Profile,
    work: Work,
    entries: list[ledger.Entry],
) -> str:
    key = work.key(profile.digests)
    others = [entry for entry in entries if entry.key != key]
    last = _last_done(client, others)
    if last is None:
        return f"{recipe.registry.model_name} has not been retrained before"
    before = _profile_of(client, last)
    if before is None or before.digests == profile.digests:
        return _NOT_DATA
    told = [
        f"{what} {value}" for what, value, met in _measured(client, recipe, before, profile) if met
    ]
    if work.key(before.digests) != last.key:
        told.append(_NOT_DATA)
    change = f"{profile.rows:,} rows to train on, {before.rows:,} before"
    return "; ".join([f"the data changed ({change})", *told])


def _profile_of(client: MlflowClient, entry: ledger.Entry) -> Profile | None:
    """What the data of an earlier retraining was like; None where it is not kept any more."""
    import tempfile

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(entry.mlflow_run_id, ledger.PROFILE, folder)
        except (MlflowException, OSError) as error:
            report(f"warning: the data profile of run {entry.run_id[:8]} can't be read: {error}")
            return None
        return Profile.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
