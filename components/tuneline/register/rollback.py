"""Go back to an earlier champion: one command, after a load check, without rewriting history."""

from __future__ import annotations

from tuneline.errors import ConflictError, RegistryError
from tuneline.progress import report
from tuneline.register.champion import (
    CHAMPION,
    LEASE_SECONDS,
    Standing,
    find_version,
    move,
    settled_standing,
)
from tuneline.register.history import Entry
from tuneline.register.promote import moved_outside
from tuneline.register.tags import MODEL_DIGEST, REPORT_DIGEST
from tuneline.register.verify import label, verify
from tuneline.tracking import mlflow_errors, open_client


def rollback(
    model_name: str,
    *,
    by: str,
    to: int | None = None,
    reason: str = "",
    lease_seconds: float = LEASE_SECONDS,
) -> int:
    """Make an earlier champion the champion again.

    The alias `previous` is where the next rollback would go: to the champion before that one, not
    back to the one that was left.

    Args:
        model_name: of the registered model.
        by: who asks; kept in the history.
        to: a version that was champion; by default the one before the present champion.
        reason: kept in the history.
        lease_seconds: how long a move of somebody else is left alone.

    Returns:
        The version that is champion now.

    Raises:
        ConflictError: a promotion or another rollback was first.
        RegistryError: nothing to go back to, a version that was never champion, that is damaged or
            does not load, or an alias that was moved by hand.
    """
    client = open_client()
    with mlflow_errors(f"rolling back {model_name}"):
        client.get_registered_model(model_name)
        now = settled_standing(client, model_name, lease_seconds)
        target = _target(now, to)
        version = find_version(client, model_name, target)
        if now.champion == target and not now.is_outside:
            report(f"{label(version)} is {CHAMPION} already")
            return target
        verify(client, version)
        entry = Entry(
            "rollback",
            target,
            by,
            reason,
            replaces=now.champion,
            model_digest=version.tags.get(MODEL_DIGEST, ""),
            report_digest=version.tags.get(REPORT_DIGEST, ""),
        )
        if move(client, now.history, entry) is None:
            now = settled_standing(client, model_name, lease_seconds)
            raise ConflictError(
                f"{model_name}: {now} became {CHAMPION} while the rollback to version {target} was "
                "checked; nothing was rolled back. Look at `tuneline history "
                f"{model_name}`, and roll back again if it still has to be"
            )
    report(f"{label(version)} is {CHAMPION} again")
    return target


def _target(now: Standing, to: int | None) -> int:
    name, past = now.history.model_name, now.history.ever_champions
    if to is None:
        if now.is_outside:
            raise RegistryError(moved_outside(now))
        if now.history.previous is None:
            raise RegistryError(
                f"{name} has no champion before {now}: there is nothing to go back to"
            )
        return now.history.previous
    if to not in past:
        known = ", ".join(map(str, past)) or "none"
        raise RegistryError(
            f"{name} version {to} was never {CHAMPION}; versions that were: {known}. A version "
            "that never was is promoted, not rolled back to"
        )
    return to
