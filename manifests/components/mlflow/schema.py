"""Bring MLflow's database to the schema of the MLflow in this image, or wait until that is done.

Servers start side by side, and each of them would begin to make the tables of an empty database;
one that meets the schema of another release ends. So one job migrates, and the servers wait for the
mark that it leaves. Where the database is, libpq's own variables say: PGHOST, PGUSER, PGPASSWORD.

    python schema.py migrate
    python schema.py wait [SECONDS]
"""

import subprocess
import sys
import time
from importlib.metadata import version

import psycopg2

VERSION = version("mlflow")
URI = "postgresql+psycopg2://"
"""Nothing but the driver: the password stands in no command line."""
LOCK = 7_316_044
"""Any number, the same in every job: of two, the second waits."""


def migrate() -> None:
    """Both schemas: of runs and models, and of users and their permissions."""
    connection = psycopg2.connect("")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        for command in (
            [sys.executable, "-m", "mlflow", "db", "upgrade", URI],
            [sys.executable, "-m", "mlflow.server.auth", "db", "upgrade", "--url", URI],
        ):
            subprocess.run(command, check=True)
        cursor.execute("CREATE TABLE IF NOT EXISTS tuneline_schema (mlflow text PRIMARY KEY)")
        cursor.execute("INSERT INTO tuneline_schema VALUES (%s) ON CONFLICT DO NOTHING", (VERSION,))
    connection.close()
    print(f"the database has the schema of MLflow {VERSION}")


def wait(seconds: float) -> None:
    """Until the job has left its mark."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = psycopg2.connect("", connect_timeout=5)
        except psycopg2.OperationalError as error:
            reason = " ".join(str(error).split())
        else:
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT to_regclass('tuneline_schema') IS NOT NULL")
                if cursor.fetchone() == (True,):
                    cursor.execute("SELECT 1 FROM tuneline_schema WHERE mlflow = %s", (VERSION,))
                    if cursor.fetchone():
                        return
            connection.close()
            reason = "the database was not migrated"
        if time.monotonic() > deadline:
            sys.exit(
                f"error: no schema of MLflow {VERSION} after {seconds:.0f} s ({reason}): look at "
                "the job tuneline-mlflow-migrate"
            )
        print(f"waiting for the schema of MLflow {VERSION}: {reason}", flush=True)
        time.sleep(min(5.0, seconds))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["migrate"]:
            migrate()
        case ["wait"]:
            wait(600)
        case ["wait", seconds]:
            wait(float(seconds))
        case _:
            sys.exit(__doc__)
