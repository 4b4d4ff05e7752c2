"""MLflow's errors become one sentence that tells no password."""

import pytest

from tuneline.errors import RegistryError
from tuneline.tracking import mlflow_errors, open_client, safe_uri


def test_a_password_in_the_uri_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    uri = "http://user:s3cret@127.0.0.1:9/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert safe_uri() == "http://127.0.0.1:9/mlflow"
    with pytest.raises(RegistryError) as caught, mlflow_errors("asking"):
        raise MlflowException(f"GET {uri}/api with s3cret failed")
    assert "s3cret" not in str(caught.value) and "asking" in str(caught.value)


def test_a_server_that_is_away_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cret@127.0.0.1:9")
    with pytest.raises(
        RegistryError, match=r"MLflow at http://127\.0\.0\.1:9: connecting"
    ) as caught:
        open_client()
    assert "s3cret" not in str(caught.value)
