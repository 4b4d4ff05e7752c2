"""Make the user that steps log in to MLflow as, with what steps need: all experiments and models
may be written, none deleted, and no user, permission or webhook touched.

Who may do that says MLFLOW_TRACKING_USERNAME and _PASSWORD, the user STEPS_USERNAME and _PASSWORD.
Called again, it puts right what differs, the password too.
"""

import os
import sys
import time

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient
from requests.exceptions import RequestException

ROLE, WORKSPACE = "tuneline-steps", "default"
GRANTS = {"experiment": "EDIT", "registered_model": "EDIT"}
"""Kind of resource, of which it is all -> permission."""
SECONDS = 900
"""The server waits for the migration, and then makes its tables."""


def user(client: AuthServiceClient, name: str, password: str) -> None:
    """Make it, or give it this password."""
    if name == os.environ["MLFLOW_TRACKING_USERNAME"]:
        sys.exit(
            f"error: steps have the administrator's login '{name}': give the secret "
            "tuneline-mlflow-steps a name of its own"
        )
    try:
        client.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)
    client.update_user_admin(name, is_admin=False)


def role(client: AuthServiceClient, name: str) -> None:
    """The role of steps, and that the user has it."""
    known = {found.name: found.id for found in client.list_roles(WORKSPACE)}
    number = known[ROLE] if ROLE in known else client.create_role(WORKSPACE, ROLE).id
    has = {one.resource_type: one for one in client.list_role_permissions(number)}
    for kind, permission in GRANTS.items():
        if kind not in has:
            client.add_role_permission(number, kind, "*", permission)
        elif has[kind].permission != permission:
            client.update_role_permission(has[kind].id, permission)
    if ROLE not in {found.name for found in client.list_user_roles(name)}:
        client.assign_role(name, number)


def main(seconds: float) -> None:
    """Wait for the server, then both."""
    name, password = os.environ["STEPS_USERNAME"], os.environ["STEPS_PASSWORD"]
    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    deadline = time.monotonic() + seconds
    while True:
        try:
            user(client, name, password)
            role(client, name)
            break
        except (MlflowException, RequestException) as error:
            reason = " ".join(str(error).split())[:300]
            if time.monotonic() > deadline:
                sys.exit(f"error: the user '{name}' can't be made: {reason}")
            print(f"waiting for MLflow: {reason}", flush=True)
            time.sleep(min(5.0, seconds))
    print(f"user '{name}' may write all experiments and models")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
