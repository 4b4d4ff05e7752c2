"""Make a registered version the champion, if its evaluation says so and it loads.

When may a version replace a champion? Its gate must have passed, and the evidence must be about
the champion that it replaces:

1. There is no champion: yes.
2. The candidate was compared with a champion at its evaluation: only while that very version is
   still champion. Else it has to be evaluated again, whatever is expected.
3. It was compared with its base only, and `expect_champion` names the champion: yes; a person
   takes the responsibility.
4. It was compared with its base only, and nothing is expected: only if candidate and champion
   answered the same test rows, and the candidate's score is no lower.

A copy from another registered model (`tuneline.copied_from`) may also replace whatever was
champion there before: it got there by these rules, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tuneline.errors import ConflictError, RegistryError
from tuneline.progress import report
from tuneline.register import history, tags
from tuneline.register.champion import (
    CHAMPION,
    LEASE_SECONDS,
    Standing,
    find_version,
    move,
    settle,
    settled_standing,
    standing,
)
from tuneline.register.history import Entry, History
from tuneline.register.verify import label, verify
from tuneline.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

NO_CHAMPION: Final = 0
"""What `expect_champion` says where there must be none yet."""
_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion: the alias is empty when it was refused."""

    version: int
    alias: str
    reason: str


@dataclass(frozen=True)
class Request:
    """Who wants which version to be champion, and what they take for granted.

    Attributes:
        version: the candidate.
        by: who asks; kept in the history.
        run_id: pipeline run that asks; a retry of it does not promote twice.
        expect_champion: version that must be champion, `NO_CHAMPION` for none, None for any.
        lease_seconds: how long a move of somebody else is left alone.
    """

    version: int
    by: str
    run_id: str = ""
    expect_champion: int | None = None
    lease_seconds: float = LEASE_SECONDS


def promote(model_name: str, request: Request) -> Promotion:
    """Move the alias `champion` to a version; the champion before becomes `previous`.

    A version that may not be promoted is not an error: the registry stays as it is, and the
    history and the answer say why.

    Raises:
        ConflictError: the champion is not the expected one, or another promotion was first.
        RegistryError: no such model or version, no verdict, files or report that differ from what
            was registered, a model that does not load, an alias that was moved by hand, or MLflow
            can't be reached. The registry is as it was.
    """
    client = open_client()
    with mlflow_errors(f"promoting {model_name} version {request.version}"):
        candidate = find_version(client, model_name, request.version)
        now = standing(client, model_name)
        if now.champion == request.version and not request.run_id:
            verify(client, candidate)  # a person who asks again wants to know whether it is whole
        if (done := _earlier_try(client, now, request)) is not None:
            return done
        if reason := refusal(client, candidate, now, request):
            return _refuse(client, candidate, now.history, request, reason)
        verify(client, candidate)
        for _ in range(_ATTEMPTS):
            now = settled_standing(client, model_name, request.lease_seconds)
            if (done := _earlier_try(client, now, request)) is not None:
                return done
            if reason := refusal(client, candidate, now, request):
                return _refuse(client, candidate, now.history, request, reason)
            entry = Entry(
                "promote",
                request.version,
                request.by,
                replaces=now.champion,
                run_id=request.run_id,
                model_digest=candidate.tags[tags.MODEL_DIGEST],
                report_digest=candidate.tags[tags.REPORT_DIGEST],
            )
            if move(client, now.history, entry) is not None:
                report(f"{label(candidate)} is {CHAMPION}")
                return Promotion(request.version, CHAMPION, "")
    raise RegistryError(
        f"{label(candidate)}: other promotions were first {_ATTEMPTS} times: try again"
    )


def _earlier_try(client: MlflowClient, now: Standing, request: Request) -> Promotion | None:
    """What this request, or its try before, has already brought about."""
    if now.champion == request.version and not now.is_outside:
        last = now.history.last_move
        if last is not None and not last.settled:
            settle(client, now.history.model_name)
        report(f"{now.history.model_name} version {request.version} is {CHAMPION}")
        return Promotion(request.version, CHAMPION, "")
    for entry in now.history.moves if request.run_id else ():
        if (entry.action, entry.version, entry.run_id) == (
            "promote", request.version, request.run_id,
        ):  # fmt: skip
            reason = (
                f"this run made it {CHAMPION} (entry {entry.number} of the history), and since "
                f"then it was replaced by {now}"
            )
            report(f"{now.history.model_name} version {request.version}: {reason}")
            return Promotion(request.version, "", reason)
    return None


def refusal(client: MlflowClient, candidate: ModelVersion, now: Standing, request: Request) -> str:
    """Why the candidate may not become champion, or an empty string.

    Raises:
        ConflictError: the champion is not the expected one.
        RegistryError: no verdict, or the alias was moved by hand.
    """
    gate = candidate.tags.get(tags.GATE)
    if gate == "refused":
        return candidate.tags.get(tags.GATE_REASONS, "its gate refused it")
    if gate != tags.PASSED or tags.MODEL_DIGEST not in candidate.tags:
        raise RegistryError(
            f"{label(candidate)} has no verdict of a gate: register it with `tuneline register`"
        )
    expected = request.expect_champion
    if expected is not None and (now.champion or NO_CHAMPION) != expected:
        wanted = f"version {expected}" if expected else "no version"
        raise ConflictError(
            f"{candidate.name}: {wanted} was expected to be {CHAMPION}, but {now} is; nothing was "
            f"changed. Evaluate version {request.version} against that one, and promote again"
        )
    if now.is_outside and expected is None:
        raise RegistryError(moved_outside(now))
    return _comparison(client, candidate, now, expected) or _approval(candidate, now.history)


def moved_outside(now: Standing) -> str:
    """The sentence for an alias that differs from the history."""
    alias = f"names version {now.alias}" if now.alias else "is gone"
    name, champion = now.history.model_name, now.history.champion
    return (
        f"{name}: the alias {CHAMPION} {alias}, but by the history version {champion} is "
        f"{CHAMPION}: it was changed outside of tuneline. `tuneline rollback {name} --to "
        f"{champion}` sets it right; to go on from it, promote with --expect-champion "
        f"{now.alias or NO_CHAMPION}"
    )


def _comparison(
    client: MlflowClient, candidate: ModelVersion, now: Standing, expected: int | None
) -> str:
    if now.champion in (None, int(candidate.version)):
        return ""
    if candidate.tags.get(tags.CHAMPION_RULE) == "ignore":
        return ""
    champion = find_version(client, candidate.name, now.champion)
    again = f"evaluate it against version {now.champion}, and promote that result"
    compared = candidate.tags.get(tags.COMPARED_DIGEST, "")
    if compared and compared in map(champion.tags.get, (tags.MODEL_DIGEST, tags.ADAPTER_DIGEST)):
        return ""
    if champion.tags.get(tags.MODEL_DIGEST) in _earlier_champions(client, candidate):
        return ""
    if compared:
        before = candidate.tags.get(tags.COMPARED_WITH, "another version")
        return f"it was compared with {before}, but {now} is {CHAMPION}: {again}"
    if expected is not None:
        return ""
    if candidate.tags.get(tags.EVAL_SET_DIGEST) != champion.tags.get(tags.EVAL_SET_DIGEST):
        return (
            f"it was compared with its base only, and {now}, which is {CHAMPION}, answered other "
            f"test rows: {again}, or name the champion with --expect-champion {now.champion}"
        )
    metric = candidate.tags.get(tags.METRIC, "")
    score, score_to_reach = _score(candidate, metric), _score(champion, metric)
    higher = candidate.tags.get(tags.HIGHER_IS_BETTER) != "false"
    if score < score_to_reach if higher else score > score_to_reach:
        return (
            f"its {metric} {score:.4f} is worse than the {score_to_reach:.4f} of {now}, which is "
            f"{CHAMPION}, on the same test rows"
        )
    return ""


def _score(version: ModelVersion, metric: str) -> float:
    try:
        return float(version.tags[tags.of_score("tuned", metric)])
    except (KeyError, ValueError) as error:
        raise RegistryError(
            f"{label(version)} has no score in '{metric}': evaluate the model again with it among "
            "evaluation.metrics, and register that"
        ) from error


def _earlier_champions(client: MlflowClient, candidate: ModelVersion) -> list[str]:
    """Digests of what was champion of the model that the candidate was copied from."""
    source = candidate.tags.get(tags.COPIED_FROM, "")
    if not source:
        return []
    entries = history.read(client, source.removeprefix("models:/").rpartition("/")[0]).moves
    return [entry.model_digest for entry in entries]


def _approval(candidate: ModelVersion, now: History) -> str:
    if candidate.tags.get(tags.APPROVAL_REQUIRED) != "true":
        return ""
    digests = (candidate.tags[tags.MODEL_DIGEST], candidate.tags[tags.REPORT_DIGEST])
    if now.approval(int(candidate.version), *digests) is not None:
        return ""
    return (
        f"it waits for an approval: `tuneline approve {candidate.name} --version "
        f"{candidate.version} --by WHO --reason ...`"
    )


def _refuse(
    client: MlflowClient, candidate: ModelVersion, seen: History, request: Request, reason: str
) -> Promotion:
    """Keep the refusal in the history, once however often it is asked for."""
    last = seen.last_move
    entry = Entry(
        "refuse",
        request.version,
        request.by,
        reason,
        builds_on=last.number if last else 0,
        run_id=request.run_id,
        model_digest=candidate.tags.get(tags.MODEL_DIGEST, ""),
        report_digest=candidate.tags.get(tags.REPORT_DIGEST, ""),
    )
    known = (entry.action, entry.version, entry.reason, entry.builds_on)
    if not any((e.action, e.version, e.reason, e.builds_on) == known for e in seen.entries):
        history.append(client, seen, entry)
    report(f"{label(candidate)} is not promoted: {reason}")
    return Promotion(request.version, "", reason)
