"""Fail where a champion is older than some days, or MLflow can't be asked.

    python champions.py DAYS

A retraining that finds nothing to do, or that the gate refuses, ends well too, so that no success
of a run says how old a champion is. It is as old as the registration of its version.
"""

import sys
from datetime import UTC, datetime, timedelta

from tuneline.errors import TunelineError
from tuneline.register.champion import CHAMPION
from tuneline.register.overview import models


def main(most: timedelta) -> int:
    """A line for each champion; 1 if one is too old.

    Raises:
        TunelineError: MLflow can't be asked.
    """
    now = datetime.now(UTC)
    old = 0
    for listed in models():
        if CHAMPION not in listed.aliases:
            continue
        age = now - datetime.fromisoformat(listed.registered_at)
        old += age > most
        print(
            f"{'STALE' if age > most else 'ok':<6} {listed.model_name} version {listed.version}: "
            f"{age.days} days old, at most {most.days}"
        )
    return 1 if old else 0


if __name__ == "__main__":
    try:
        days = float(sys.argv[1]) if len(sys.argv) == 2 else -1.0
        sys.exit(main(timedelta(days=days)) if days > 0 else __doc__)
    except TunelineError as error:
        sys.exit(f"error: {error}")
