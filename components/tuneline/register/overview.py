"""What a person or a program reads of the registry: the history of a model, and all models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tuneline.recipe import BOOKS
from tuneline.register import history, tags
from tuneline.register.champion import CHAMPION, PREVIOUS
from tuneline.register.history import MOVES, Entry, History
from tuneline.register.register import CHALLENGER
from tuneline.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


@dataclass(frozen=True)
class Event:
    """An entry of the history, and what came of it."""

    number: int
    at: str
    """UTC, ISO 8601, by the server's clock."""
    action: str
    version: int
    by: str
    outcome: str
    """What it did, or why not."""
    run_id: str
    report_digest: str


@dataclass(frozen=True)
class Listed:
    """A version as `tuneline models` shows it."""

    model_name: str
    version: int
    aliases: tuple[str, ...]
    method: str
    metric: str
    base_score: str
    tuned_score: str
    gate: str
    registered_at: str


def events(model_name: str) -> list[Event]:
    """Every promotion, refusal, approval and rollback, in order.

    Raises:
        RegistryError: no such model, a history that was changed, or MLflow can't be reached.
    """
    client = open_client()
    with mlflow_errors(f"reading the history of {model_name}"):
        client.get_registered_model(model_name)
        now = history.read(client, model_name)
    return [
        Event(
            entry.number,
            _when(entry.written_at_ms),
            entry.action,
            entry.version,
            entry.by,
            _outcome(now, entry),
            entry.run_id,
            entry.report_digest,
        )
        for entry in now.visible()
    ]


def _outcome(now: History, entry: Entry) -> str:
    if entry.action not in MOVES:
        return entry.reason
    if not now.took_effect(entry):
        winner = next(m for m in now.moves if m.builds_on == entry.builds_on)
        return f"void: version {winner.version} was first (entry {winner.number})"
    done = f"{CHAMPION} instead of {entry.replaces or 'none'}"
    if not entry.settled:
        done += ", aliases not yet set"
    return f"{done}: {entry.reason}" if entry.reason else done


def models(model_name: str | None = None) -> list[Listed]:
    """All versions of all models that tuneline registered, or of one.

    Raises:
        RegistryError: MLflow can't be reached, or there is no such model.
    """
    client = open_client()
    found: list[Listed] = []
    with mlflow_errors("listing models"):
        if model_name is not None:
            registered = [client.get_registered_model(model_name)]
        else:
            registered = _all(client.search_registered_models)
        for model in registered:
            if model.name.endswith(BOOKS):
                continue
            query = f"name = '{model.name}'"
            versions = _all(client.search_model_versions, query)
            found += [
                _listed(model, version)
                for version in sorted(versions, key=lambda v: int(v.version))
                if tags.MODEL_DIGEST in version.tags
            ]
    return found


def _all(search: Any, query: str | None = None) -> list[Any]:
    items: list[Any] = []
    token = None
    while True:
        page = search(query, page_token=token)
        items += page
        if not (token := page.token):
            return items


def _listed(model: RegisteredModel, version: ModelVersion) -> Listed:
    told = version.tags
    metric = told.get(tags.METRIC, "exact_match")
    order = (CHAMPION, PREVIOUS, CHALLENGER)
    names = [name for name, number in model.aliases.items() if int(number) == int(version.version)]
    return Listed(
        model.name,
        int(version.version),
        tuple(sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n))),
        told.get(f"{tags.TAG}method", ""),
        metric,
        told.get(tags.of_score("base", metric), ""),
        told.get(tags.of_score("tuned", metric), ""),
        told.get(tags.GATE, ""),
        _when(version.creation_timestamp),
    )


def _when(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def as_json(items: list[Event] | list[Listed]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(item) for item in items]
