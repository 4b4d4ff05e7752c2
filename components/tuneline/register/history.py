"""The history of a registered model: numbered entries in MLflow that decide who is champion.

MLflow can't move an alias on a condition, so a race of two promotions can't be decided by the
alias. It is decided here. The history of model NAME is a registered model `NAME.history`, each
version of it one entry, its tags the content. Two things that MLflow's database guarantees carry
everything:

- a version and its tags are one transaction, and (name, version) is a primary key: entries have
  one order that every process sees alike, and an entry is there as a whole or not at all;
- a number is never given twice, also not after a version was deleted.

A promotion appends its entry with the number of the entry that it builds on, and reads the history
back. The first entry that builds on the present champion's entry takes effect; every later one
that builds on the same is void, and its writer learns who won. No clock takes part in this, and a
process that dies holds nothing up. What the aliases have to be follows from the history
(`tuneline.register.champion`).

Entries are never changed; only `tuneline.settled` is added. Each holds the digest of all the
entries that its writer had read, so that one which is changed or removed is noticed by the next
reader. Who can write all of MLflow's database can still write another history from its start, cut
off its end, or remove it as a whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, get_args

from tuneline.artifacts import digest_of
from tuneline.errors import RegistryError
from tuneline.recipe import HISTORY_SUFFIX
from tuneline.register.tags import TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SETTLED: Final = f"{TAG}settled"
Action = Literal["promote", "rollback", "approve", "refuse"]
MOVES: Final = ("promote", "rollback")
"""The actions that change the champion."""
_PAGE: Final = 1000
_TRIES: Final = 5
_NO_CHAIN: Final = digest_of([])


@dataclass(frozen=True)
class Entry:
    """One thing that was done, or was refused, to a version."""

    action: Action
    version: int
    by: str
    """Who asked for it: as given, MLflow does not prove it."""
    reason: str = ""
    builds_on: int = 0
    """Number of the entry that made the champion that this one replaces; 0: none did."""
    replaces: int | None = None
    """Version that was champion when this entry was written."""
    run_id: str = ""
    """Pipeline run that asked for it, empty for a person."""
    model_digest: str = ""
    report_digest: str = ""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names this entry: a request that is sent twice is one entry."""
    seen: int = 0
    """How many entries its writer had read."""
    chain: str = _NO_CHAIN
    """Digest over those entries."""
    number: int = 0
    """Place in the history, given by MLflow; 0 before it is written."""
    written_at_ms: int = 0
    """Server's clock, milliseconds since 1970."""
    settled: bool = False
    """Whether the aliases were moved to where this entry says."""

    def content(self) -> dict[str, str]:
        """What is stored, and what the digest covers."""
        values = {
            "action": self.action,
            "version": self.version,
            "by": self.by,
            "reason": self.reason,
            "builds_on": self.builds_on,
            "replaces": "" if self.replaces is None else self.replaces,
            "run_id": self.run_id,
            "model_digest": self.model_digest,
            "report_digest": self.report_digest,
            "token": self.token,
            "seen": self.seen,
            "chain": self.chain,
        }
        return {TAG + key: str(value) for key, value in values.items()}


@dataclass(frozen=True)
class History:
    """All entries of a model, in order, and what they amount to."""

    model_name: str
    entries: tuple[Entry, ...] = ()

    @property
    def moves(self) -> tuple[Entry, ...]:
        """The promotions and rollbacks that took effect."""
        effective: list[Entry] = []
        tokens: set[str] = set()
        for entry in self.entries:
            last = effective[-1].number if effective else 0
            if entry.action in MOVES and entry.builds_on == last and entry.token not in tokens:
                effective.append(entry)
            tokens.add(entry.token)
        return tuple(effective)

    @property
    def last_move(self) -> Entry | None:
        """The entry that made the present champion."""
        moves = self.moves
        return moves[-1] if moves else None

    @property
    def champions(self) -> tuple[int, ...]:
        """The present champion is last; before it stands where a rollback goes."""
        stack: list[int] = []
        for entry in self.moves:
            if entry.replaces is not None and entry.replaces not in stack[-1:]:
                stack.append(entry.replaces)  # made champion before or outside of this history
            if entry.action == "rollback" and entry.version in stack:
                del stack[stack.index(entry.version) + 1 :]
            elif entry.version not in stack[-1:]:
                stack.append(entry.version)
        return tuple(stack)

    @property
    def champion(self) -> int | None:
        """The version that the history makes champion."""
        return self.champions[-1] if self.entries and self.champions else None

    @property
    def previous(self) -> int | None:
        """The version that a rollback goes to."""
        return self.champions[-2] if len(self.champions) > 1 else None

    @property
    def ever_champions(self) -> tuple[int, ...]:
        """Every version that was champion, each once, the earliest first."""
        versions = [v for move in self.moves for v in (move.replaces, move.version)]
        return tuple(dict.fromkeys(v for v in versions if v is not None))

    def written(self, token: str) -> Entry | None:
        """The entry of that token: the first, where a request was sent twice."""
        return next((entry for entry in self.entries if entry.token == token), None)

    def visible(self) -> list[Entry]:
        """The entries without those that a repeated request doubled."""
        first = {entry.token: entry.number for entry in reversed(self.entries)}
        return [entry for entry in self.entries if first[entry.token] == entry.number]

    def took_effect(self, entry: Entry) -> bool:
        """Whether an entry that moves the champion did."""
        return any(move.number == entry.number for move in self.moves)

    def approval(self, version: int, model_digest: str, report_digest: str) -> Entry | None:
        """The last approval of exactly these files and this report."""
        digests = (model_digest, report_digest)
        return next(
            (
                entry
                for entry in reversed(self.entries)
                if entry.action == "approve"
                and entry.version == version
                and (entry.model_digest, entry.report_digest) == digests
            ),
            None,
        )


def history_name(model_name: str) -> str:
    """The registered model that holds the history of `model_name`."""
    return model_name + HISTORY_SUFFIX


def chain_of(entries: Iterable[Entry]) -> str:
    """Digest over entries, their numbers and the server's times."""
    chain = _NO_CHAIN
    for entry in entries:
        chain = digest_of([chain, entry.number, entry.written_at_ms, entry.content()])
    return chain


def read(client: MlflowClient, model_name: str) -> History:
    """The history as it stands; empty if there is none.

    Raises:
        RegistryError: an entry is missing, was changed, or is not one of ours.
    """
    query = f"name = '{history_name(model_name)}'"
    found: list[ModelVersion] = []
    token = None
    while True:
        # in the order of creation, so that what is appended meanwhile moves no page
        page = client.search_model_versions(
            query, max_results=_PAGE, order_by=["version_number ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    entries = [_parse(version) for version in found]
    _verify(model_name, entries)
    return History(model_name, tuple(entries))


def _parse(version: ModelVersion) -> Entry:
    tags = {
        key.removeprefix(TAG): value for key, value in version.tags.items() if key.startswith(TAG)
    }
    try:
        action = next(known for known in get_args(Action) if known == tags["action"])
        return Entry(
            action=action,
            version=int(tags["version"]),
            by=tags["by"],
            reason=tags["reason"],
            builds_on=int(tags["builds_on"]),
            replaces=int(tags["replaces"]) if tags["replaces"] else None,
            run_id=tags["run_id"],
            model_digest=tags["model_digest"],
            report_digest=tags["report_digest"],
            token=tags["token"],
            seen=int(tags["seen"]),
            chain=tags["chain"],
            number=int(version.version),
            written_at_ms=version.creation_timestamp,
            settled=SETTLED in version.tags,
        )
    except (KeyError, ValueError, StopIteration) as error:
        raise _tampered(version.name, f"entry {version.version} is not one of ours") from error


def _verify(model_name: str, entries: Sequence[Entry]) -> None:
    name = history_name(model_name)
    chain, chains = _NO_CHAIN, [_NO_CHAIN]
    for place, entry in enumerate(entries, 1):
        if entry.number != place:
            raise _tampered(name, f"entry {place} was removed")
        if entry.seen >= place or entry.chain != chains[entry.seen]:
            raise _tampered(
                name, f"an entry before {entry.number} was changed after {entry.number} was written"
            )
        chain = digest_of([chain, entry.number, entry.written_at_ms, entry.content()])
        chains.append(chain)


def _tampered(name: str, fault: str) -> RegistryError:
    return RegistryError(
        f"the history {name} can't be trusted: {fault}. Nothing is promoted on it. See who changed "
        f"it; to begin a new history, rename the registered model {name} in MLflow, which keeps "
        "the old one for inspection"
    )


def append(client: MlflowClient, history: History, entry: Entry) -> tuple[History, Entry]:
    """Write an entry after those of `history`, and read the history back.

    MLflow repeats a request whose answer was lost; the token tells which entries are one.

    Returns:
        The history with it, and the entry as it was written.

    Raises:
        MlflowException: it could not be written.
    """
    from mlflow.exceptions import MlflowException

    entry = replace(entry, seen=len(history.entries), chain=chain_of(history.entries))
    if not history.entries:
        _create_history(client, history.model_name)
    for attempt in range(_TRIES):
        failure = None
        try:
            client.create_model_version(
                history_name(history.model_name),
                source=f"models:/{history.model_name}/{entry.version}",
                tags=entry.content(),
                description=sentence(entry),
                await_creation_for=0,
            )
        except MlflowException as error:  # it may be there all the same
            failure = error
        now = read(client, history.model_name)
        if (written := now.written(entry.token)) is not None:
            return now, written
        if failure is not None and attempt == _TRIES - 1:
            raise failure
        time.sleep(0.2 * 2**attempt)
    raise RegistryError(f"{history_name(history.model_name)} does not keep what is written to it")


def _create_history(client: MlflowClient, model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            history_name(model_name),
            tags={f"{TAG}history_of": model_name},
            description=f"What was promoted, refused, approved and rolled back of {model_name}: "
            f"one version per entry, never changed. Read it with `tuneline history {model_name}`.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def sentence(entry: Entry) -> str:
    """What a person reads of an entry in MLflow's UI."""
    verb = {
        "promote": "asks to make version {} champion",
        "rollback": "goes back to version {}",
        "approve": "approves version {}",
        "refuse": "was refused version {}",
    }[entry.action].format(entry.version)
    return f"{entry.by} {verb}" + (f": {entry.reason}" if entry.reason else "")


def mark_settled(client: MlflowClient, history: History, entry: Entry) -> None:
    """Note that the aliases are where the entry says."""
    client.set_model_version_tag(
        history_name(history.model_name), str(entry.number), SETTLED, "true"
    )
