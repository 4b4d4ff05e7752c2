"""manifests/secrets.sh makes what the overlays read, once."""

import json
from collections.abc import Callable
from pathlib import Path

Secrets = dict[tuple[str, str], dict[str, str]]


def test_logins_fit_each_other(secrets: Secrets) -> None:
    admin = secrets["tuneline", "tuneline-mlflow-admin"]
    steps = secrets["tuneline", "tuneline-mlflow-steps"]
    for name in ("tuneline-mlflow", "kfp-mlflow-credentials"):
        assert secrets["kubeflow", name] == steps
    assert not {steps["username"], steps["password"]} & set(admin.values())
    store = secrets["tuneline", "tuneline-object-store"]
    keys = {identity["name"]: identity for identity in json.loads(store["s3.json"])["identities"]}
    for namespace, bucket in (("tuneline", "mlflow"), ("kubeflow", "tuneline")):
        login = secrets[namespace, "tuneline-s3"]
        identity = keys[login["access_key_id"]]
        assert identity["credentials"] == [
            {"accessKey": login["access_key_id"], "secretKey": login["secret_access_key"]}
        ]
        # each sees its own bucket only
        assert {action.partition(":")[2] for action in identity["actions"]} == {bucket}
    assert keys["admin"]["credentials"] == [
        {
            "accessKey": store["admin_access_key_id"],
            "secretKey": store["admin_secret_access_key"],
        }
    ]


def test_secrets_are_long_and_differ(secrets: Secrets) -> None:
    values = [
        value
        for (namespace, name), data in secrets.items()
        for key, value in data.items()
        if (namespace, name) not in {
            ("kubeflow", "tuneline-mlflow"), ("kubeflow", "kfp-mlflow-credentials"),
            ("kubeflow", "tuneline-s3"), ("tuneline", "tuneline-s3"),
        }
        and ("password" in key or "secret" in key)
    ]  # fmt: skip
    assert len(values) == len(set(values)) == 9
    assert all(len(value) >= 48 for value in values)


def test_a_second_call_changes_nothing(
    make_secrets: Callable[[Path], Secrets], tmp_path: Path
) -> None:
    first = make_secrets(tmp_path)
    assert make_secrets(tmp_path) == first
    (tmp_path / "kubeflow.tuneline-s3").unlink()  # what is lost is made again from what is there
    assert make_secrets(tmp_path) == first
