"""Schedules as a file says them: what differs on the cluster, and how it becomes equal.

KFP's recurring runs can't be changed, only switched on and off. So a schedule carries the digest of
its definition in its description; one with another digest is made again. The same line marks what
tuneline made, and for which group: nothing else is touched.

No recurring run says anything to KFP's MLflow plugin (`plugins_input`). The API server of KFP 2.17
makes one that does, and that is pinned to a version, without its parameters (`CreateJob` in
resource_manager.go calls NewGenericScheduledWorkflow, which has none): every run of it would take
the pipeline's defaults. Without it, Argo starts the runs past the plugin, and tuneline keeps the
record in MLflow by itself, in the recipe's experiment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from tuneline import recipe as recipes
from tuneline.artifacts import digest_of
from tuneline.errors import ClusterError, RecipeError, UsageError
from tuneline.settings import Settings
from tuneline_pipelines import cron
from tuneline_pipelines.client import (
    NEWEST,
    Version,
    arguments_of,
    experiment_id,
    pipeline_name,
    published,
    unpublished,
)
from tuneline_pipelines.connection import Connection, equals

Action = Literal["create", "update", "enable", "disable", "remove", "unchanged"]
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_MARK: Final = re.compile(
    r"^tuneline-schedule group=(?P<group>\S+) digest=(?P<digest>sha256:[0-9a-f]{64})$", re.MULTILINE
)

_ALWAYS: Final[dict[str, Any]] = {"max_concurrency": "1", "no_catchup": True}
"""Of every schedule: what was missed is not made up for, and a run that still goes on is waited
for."""


class Schedule(Settings):
    """One schedule. It never catches up on what it missed, and has one run at a time."""

    name: str = Field(pattern=_NAME)
    """Of the schedule, once in the file."""
    cron: str
    """Second, minute, hour, day of month, month, day of week; in the time zone of KFP's controller,
    UTC unless it was set up otherwise."""
    pipeline: str = Field(default="retrain", min_length=1)
    """Published pipeline; `finetune` is that of the recipe's method."""
    version: str = Field(default=NEWEST, min_length=1)
    """Of the pipeline; `newest` is the one that is newest when the file is applied."""
    recipe: str = ""
    """Path, from the file's own folder; unset: for pipelines that take none, such as `promote`."""
    overrides: dict[str, dict[str, Any]] = Field(default={})
    """Sections of the recipe with the settings that differ."""
    pool: str | None = None
    """Node pool; unset: the package's default."""
    parameters: dict[str, Any] = Field(default={})
    """Parameters of the pipeline that no recipe sets."""
    enabled: bool = True
    """Whether it fires."""

    @field_validator("overrides", "parameters")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"takes what JSON has, a date in quotes for example ({error})"
            ) from None
        return value

    @field_validator("cron")
    @classmethod
    def _fires_as_meant(cls, value: str) -> str:
        return cron.check(value)


class Schedules(Settings):
    """A file of schedules."""

    group: str = Field(default="default", pattern=_NAME)
    """Whose schedules these are: `apply` removes those of its own group only, so that teams that
    share a namespace keep a file each."""
    experiment: str | None = Field(default=None, min_length=1)
    """KFP experiment; unset: the recipe's, or `tuneline`."""
    service_account: str = ""
    """Of the pods; unset: the server's default."""
    schedules: tuple[Schedule, ...]
    """All of the group; an empty list removes every one."""

    @model_validator(mode="after")
    def _named_once(self) -> Schedules:
        names = [schedule.name for schedule in self.schedules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"schedules are there twice: {', '.join(twice)}; give each its name")
        return self


def read(path: Path) -> Schedules:
    """Read a file of schedules.

    Raises:
        RecipeError: no such file, not YAML, or faults in it.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(str(path), ["no such file; examples/schedules.yaml is one"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"can't be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise RecipeError(str(path), [f"must be a mapping of {', '.join(Schedules.model_fields)}"])
    return recipes.check(Schedules, values, source=str(path))


@dataclass(frozen=True)
class Definition:
    """A schedule with everything that its file leaves to the recipe and the server."""

    name: str
    group: str
    cron: str
    version: Version
    parameters: Mapping[str, Any]
    experiment: str
    service_account: str
    enabled: bool

    @property
    def digest(self) -> str:
        """Of what can't be changed on the cluster."""
        return digest_of(
            [
                self.cron,
                self.version.reference,
                dict(self.parameters),
                self.experiment,
                self.service_account,
                _ALWAYS,
            ]
        )

    @property
    def description(self) -> str:
        """As the cluster keeps it."""
        return (
            f"{self.version.package.name} {self.version.version_name}, by `tuneline schedule "
            f"apply`: change its file, not this\n"
            f"tuneline-schedule group={self.group} digest={self.digest}"
        )


def definitions(connection: Connection, schedules: Schedules, folder: Path) -> list[Definition]:
    """Every schedule, checked as a whole before anything on the cluster changes.

    Args:
        connection: of the server.
        schedules: of the file.
        folder: of the file.

    Raises:
        UsageError: a pipeline or version is not published, or parameters don't fit it.
        RecipeError: a recipe has faults.
    """
    versions: dict[tuple[str, str], Version] = {}
    return [_define(connection, schedules, one, folder, versions) for one in schedules.schedules]


def _define(
    connection: Connection,
    schedules: Schedules,
    schedule: Schedule,
    folder: Path,
    versions: dict[tuple[str, str], Version],
) -> Definition:
    where = f"schedule {schedule.name}"
    recipe, name = None, schedule.pipeline
    if schedule.recipe:
        overrides = [
            f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
            for section, keys in schedule.overrides.items()
            for key, value in keys.items()
        ]
        exports = schedule.pipeline != "compare"
        recipe = recipes.read(folder / schedule.recipe, overrides, exports=exports)
        name = pipeline_name(schedule.pipeline, recipe)
    elif schedule.overrides or name == "finetune":
        raise UsageError(f"{where}: name the recipe that it is about, as in recipe: orders.yaml")
    key = (name, schedule.version)
    try:
        if key not in versions:
            found = published(connection, name, schedule.version)
            if found is None:
                raise unpublished(connection, name)
            versions[key] = found
        arguments = arguments_of(
            versions[key].package, recipe, pool=schedule.pool, further=schedule.parameters
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    named = recipe.registry.experiment if recipe is not None else "tuneline"
    return Definition(
        schedule.name,
        schedules.group,
        schedule.cron,
        versions[key],
        arguments,
        schedules.experiment or named,
        schedules.service_account,
        schedule.enabled,
    )


@dataclass(frozen=True)
class Change:
    """What has to happen to one schedule."""

    action: Action
    name: str
    reason: str = ""
    definition: Definition | None = None
    present: tuple[Any, ...] = ()
    """Recurring runs of this name and group, the one to keep first."""


def mark_of(recurring: Any) -> tuple[str, str] | None:
    """Group and digest of a schedule that tuneline made; None for any other."""
    match = _MARK.search(recurring.description or "")
    return (match["group"], match["digest"]) if match else None


def present(connection: Connection) -> Iterator[Any]:
    """All recurring runs of the namespace."""
    return connection.pages(
        "listing schedules",
        connection.recurring_runs.recurring_run_service_list_recurring_runs,
        "recurring_runs",
        sort_by="created_at asc",
        **connection.scope,
    )


def changes(wanted: Sequence[Definition], group: str, recurring: Iterable[Any]) -> list[Change]:
    """What makes the cluster equal to the file, in the file's order, removals last.

    Raises:
        UsageError: a schedule of a wanted name is there that tuneline did not make, or another
            group: both would fire.
    """
    ours: dict[str, list[Any]] = {}
    foreign: dict[str, str] = {}
    for one in recurring:
        mark = mark_of(one)
        if mark is not None and mark[0] == group:
            ours.setdefault(one.display_name, []).append(one)
        else:
            foreign[one.display_name] = f"group {mark[0]}" if mark else "somebody by hand"
    for definition in wanted:
        if definition.name in foreign and definition.name not in ours:
            raise UsageError(
                f"schedule {definition.name} is there already, made by {foreign[definition.name]}: "
                "give this one another name, or delete that one in KFP"
            )
    found = [_change(definition, ours.pop(definition.name, [])) for definition in wanted]
    found += [
        Change("remove", name, "it is not in the file", present=tuple(ones))
        for name, ones in ours.items()
    ]
    return found


def _change(definition: Definition, there: list[Any]) -> Change:
    name = definition.name
    if not there:
        return Change("create", name, definition.cron, definition)
    same = [one for one in there if (mark := mark_of(one)) and mark[1] == definition.digest]
    if not same:
        reason = _difference(definition, there[-1])
        return Change("update", name, reason, definition, tuple(there))
    keep = same[-1]
    ordered = (keep, *(one for one in there if one is not keep))
    if is_enabled(keep) != definition.enabled:
        action: Action = "enable" if definition.enabled else "disable"
        return Change(action, name, "the file says so", definition, ordered)
    if len(ordered) > 1:
        reason = f"it is there {len(ordered)} times, one stays"
        return Change("update", name, reason, definition, ordered)
    return Change("unchanged", name, "", definition, ordered)


def is_enabled(recurring: Any) -> bool:
    """Whether it fires."""
    return recurring.status == "ENABLED" or recurring.mode == "ENABLE"


def cron_of(recurring: Any) -> str:
    """When it fires; empty for an interval."""
    schedule = recurring.trigger and recurring.trigger.cron_schedule
    return (schedule and schedule.cron) or ""


def _difference(definition: Definition, recurring: Any) -> str:
    found = []
    if cron_of(recurring) != definition.cron:
        found.append(f"cron '{cron_of(recurring)}' -> '{definition.cron}'")
    reference = recurring.pipeline_version_reference
    if reference is None or reference.pipeline_id != definition.version.pipeline_id:
        found.append(f"pipeline -> {definition.version.package.name}")
    elif reference.pipeline_version_id != definition.version.version_id:
        found.append(f"version -> {definition.version.version_name}")
    before = (recurring.runtime_config and recurring.runtime_config.parameters) or {}
    after = definition.parameters
    changed = [n for n in (*after, *(set(before) - set(after))) if before.get(n) != after.get(n)]
    if changed:
        found.append(f"parameters {', '.join(changed)}")
    return "; ".join(found) or "experiment or service account"


def apply(connection: Connection, todo: Sequence[Change], show: Callable[[Change], None]) -> None:
    """Carry the changes out, one after the other; `show` takes each that is done.

    A new definition is made switched off, then the old one deleted, then the new one switched on:
    so nothing fires twice, and a definition that the server refuses leaves the old one as it was.
    Stopped in between, the next `apply` finishes the work.

    Raises:
        ClusterError: the server refused; what was done before stays.
    """
    for change in todo:
        try:
            _carry_out(connection, change)
        except ClusterError as error:
            raise ClusterError(
                f"{error}; what was done before stays, and the next `tuneline schedule apply` "
                "goes on from there"
            ) from error
        show(change)


def _carry_out(connection: Connection, change: Change) -> None:
    definition, there = change.definition, change.present
    if definition is None:
        for one in there:
            _delete(connection, one)
        return
    keep = there[0] if there and (mark_of(there[0]) or ("", ""))[1] == definition.digest else None
    extra = [one for one in there if one is not keep]
    if keep is None:
        keep = _make(connection, definition, {one.recurring_run_id for one in extra})
    for one in extra:
        _delete(connection, one)
    if is_enabled(keep) != definition.enabled:
        service = connection.recurring_runs
        switch = (
            service.recurring_run_service_enable_recurring_run
            if definition.enabled
            else service.recurring_run_service_disable_recurring_run
        )
        connection.call(f"switching {definition.name}", switch, keep.recurring_run_id)


def _make(connection: Connection, definition: Definition, known: set[str]) -> Any:
    import kfp_server_api as api

    where = experiment_id(connection, definition.experiment)
    body = api.V2beta1RecurringRun(
        display_name=definition.name,
        description=definition.description,
        experiment_id=where,
        pipeline_version_reference=api.V2beta1PipelineVersionReference(
            **definition.version.reference
        ),
        runtime_config=api.V2beta1RuntimeConfig(parameters=dict(definition.parameters)),
        service_account=definition.service_account or None,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=definition.cron)),
        **_ALWAYS,
        mode=api.RecurringRunMode.DISABLE,
    )
    service = connection.recurring_runs

    def find() -> list[Any]:
        named = connection.pages(
            f"looking for schedule {definition.name}",
            service.recurring_run_service_list_recurring_runs,
            "recurring_runs",
            experiment_id=where,
            sort_by="created_at asc",
            filter=equals("display_name", definition.name),
        )
        mark = (definition.group, definition.digest)
        return [r for r in named if r.recurring_run_id not in known and mark_of(r) == mark]

    return connection.create(
        f"making schedule {definition.name}",
        lambda **keywords: service.recurring_run_service_create_recurring_run(body, **keywords),
        find,
        lambda extra: _delete(connection, extra),
    )


def _delete(connection: Connection, recurring: Any) -> None:
    from tuneline_pipelines.connection import Fault

    try:
        connection.call(
            f"removing schedule {recurring.display_name}",
            connection.recurring_runs.recurring_run_service_delete_recurring_run,
            recurring.recurring_run_id,
        )
    except Fault as fault:
        if fault.status != 404:  # this request, when its answer was lost, or another person
            raise
