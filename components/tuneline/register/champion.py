"""Who is champion: moves decided by the history, aliases that follow it.

A move has three steps: append the entry, set the aliases, mark the entry settled. Only the first
decides. A process may die after any of them:

- before the entry: nothing has happened;
- after the entry: the aliases still name the champion before, which serves. Whoever comes next
  waits `LEASE_SECONDS` for the writer, counted by its own clock from when it first saw the entry,
  and then sets the aliases itself. The unsettled entry is the lease; nobody renews it, and it
  can't block longer;
- after the aliases: the entry is marked by whoever comes next.

A process that was paused between the entry and the aliases reads the history again before it
writes, and once more after: what it sets is always the present champion. There remains a pause of
more than the lease between that reading and the one request, followed by the death of the process
before its second reading: then the alias names an earlier champion although the history has a
later one. MLflow has no conditional write to close this. The next command notices and says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tuneline.errors import RegistryError
from tuneline.register import history
from tuneline.register.history import Entry, History

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION: Final = "champion"
PREVIOUS: Final = "previous"
LEASE_SECONDS: Final = 60.0
"""How long the writer of an entry is left alone to set the aliases: two requests, with time for
some of MLflow's own repetitions."""
_POLL_SECONDS: Final = 0.5
_DOUBT_SECONDS: Final = 3.0
"""How long an alias that differs from the history is watched before that is believed: a paused
process may just be setting it right."""


def alias_of(client: MlflowClient, model_name: str, alias: str) -> int | None:
    """The version that an alias names now."""
    version = client.get_registered_model(model_name).aliases.get(alias)
    return None if version is None else int(version)


def find_version(client: MlflowClient, model_name: str, number: int) -> ModelVersion:
    """A version that exists.

    Raises:
        RegistryError: no such model or version; says which there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(model_name, str(number))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        there = client.search_model_versions(f"name = '{model_name}'", max_results=100)
        if not there:
            raise RegistryError(
                f"no model {model_name} is registered: `tuneline models` lists what is"
            ) from error
        numbers = ", ".join(str(n) for n in sorted(int(v.version) for v in there)[-10:])
        raise RegistryError(
            f"{model_name} has no version {number}; its last versions are {numbers}"
        ) from error
    return found


@dataclass(frozen=True)
class Standing:
    """The history, and where the alias `champion` is."""

    history: History
    alias: int | None

    @property
    def is_outside(self) -> bool:
        """Whether somebody moved the alias outside of tuneline, or deleted its version."""
        last = self.history.last_move
        return last is not None and last.settled and self.alias != self.history.champion

    @property
    def champion(self) -> int | None:
        """What serves, or is about to: an alias that is not yet set follows the history."""
        last = self.history.last_move
        return self.alias if last is None or last.settled else self.history.champion

    def __str__(self) -> str:
        """`version 3 (entry 12, by WHO)`."""
        last = self.history.last_move
        if self.champion is None:
            return "no version"
        if last is None or last.version != self.champion:
            return f"version {self.champion}"
        return f"version {self.champion} (entry {last.number}, by {last.by})"


def standing(client: MlflowClient, model_name: str) -> Standing:
    """How it stands now, without waiting for a move that is under way."""
    doubt_ends = time.monotonic() + _DOUBT_SECONDS
    while True:
        now = history.read(client, model_name)
        found = Standing(now, alias_of(client, model_name, CHAMPION))
        if not found.is_outside or time.monotonic() > doubt_ends:
            return found
        time.sleep(_POLL_SECONDS)


def settled_standing(client: MlflowClient, model_name: str, lease_seconds: float) -> Standing:
    """How it stands when no move is under way: the next one may be appended."""
    seen: Entry | None = None
    since = time.monotonic()
    while True:
        found = standing(client, model_name)
        last = found.history.last_move
        if last is None or last.settled:
            return found
        if seen is None or seen.number != last.number:
            seen, since = last, time.monotonic()
        if time.monotonic() - since >= lease_seconds:  # its writer is gone
            settle(client, model_name)
        else:
            time.sleep(min(_POLL_SECONDS, lease_seconds / 4))


def settle(client: MlflowClient, model_name: str) -> History:
    """Set the aliases to what the history says, and mark its last move settled.

    `previous` goes first, so that the champion before always has a name. `champion` is only ever
    overwritten, never removed. Safe to run by many at once, and again.
    """
    now = history.read(client, model_name)
    while (last := now.last_move) is not None:
        _set_previous(client, now)
        _set_alias(client, model_name, CHAMPION, now.champion)
        after = history.read(client, model_name)
        if after.last_move is not None and after.last_move.number == last.number:
            if not after.last_move.settled:
                history.mark_settled(client, after, last)
            return after
        now = after
    return now


def _set_previous(client: MlflowClient, now: History) -> None:
    if now.previous is not None:
        _set_alias(client, now.model_name, PREVIOUS, now.previous)
    elif alias_of(client, now.model_name, PREVIOUS) is not None:
        client.delete_registered_model_alias(now.model_name, PREVIOUS)


def _set_alias(client: MlflowClient, model_name: str, alias: str, number: int | None) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(model_name, alias, str(number))
    except MlflowException as error:
        # deleted in MLflow after it was champion: no alias can name it, and a rollback must work
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def move(client: MlflowClient, seen: History, entry: Entry) -> Entry | None:
    """Append an entry that changes the champion, and carry it out if it was first.

    Args:
        client: of the server.
        seen: the history that the decision was made on.
        entry: what to append; `builds_on` is set here.

    Returns:
        The entry if it took effect, None if another was first.
    """
    last = seen.last_move
    entry = replace(entry, builds_on=last.number if last else 0)
    after, written = history.append(client, seen, entry)
    if not after.took_effect(written):
        return None
    settle(client, seen.model_name)
    return written
