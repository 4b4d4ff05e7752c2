"""Registration, promotion, rollback and approval against a real MLflow store in a file."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from tuneline import steps
from tuneline.errors import ArtifactError, ConflictError, RecipeError, RegistryError
from tuneline.register import history
from tuneline.register.approve import approve
from tuneline.register.champion import settle
from tuneline.register.copy import copy_and_promote
from tuneline.register.overview import events, models
from tuneline.register.promote import NO_CHAMPION, Promotion, Request
from tuneline.register.promote import promote as promote_version
from tuneline.register.register import register
from tuneline.register.rollback import rollback
from tuneline.register.webhook import APPROVE, receive
from tuneline.tracking import Untracked
from tuneline_pipelines.cli import main

Make = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def client(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a store of the test's own."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    client.create_experiment("here", artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.setattr(
        "tuneline.register.register._experiment_id", lambda client, step: "1"
    )  # the default experiment keeps its files where the database was made
    yield client
    mlflow.set_tracking_uri(None)


@pytest.fixture
def add(make_candidate: Make, client: object) -> Callable[..., int]:
    """Registers a candidate; returns its version."""

    def add(name: str, *, require_approval: bool = False, run_id: str = "", **measured: Any) -> int:
        model, report = make_candidate(name, **measured)
        return register(model, report, "m", run_id, Untracked(), require_approval=require_approval)

    return add


def promote(version: int, name: str = "m", **request: Any) -> Promotion:
    return promote_version(name, Request(version, "me", lease_seconds=0.2, **request))


def aliases(client: Any, name: str = "m") -> dict[str, int]:
    return {k: int(v) for k, v in client.get_registered_model(name).aliases.items()}


def actions() -> list[tuple[str, int]]:
    return [(event.action, event.version) for event in events("m")]


def compared_with(client: Any, version: int) -> dict[str, Any]:
    digest = client.get_model_version("m", str(version)).tags["tuneline.model_digest"]
    return {"name": "m", "version": version, "digest": digest, "compared": True}


def test_a_passed_version_becomes_champion_and_the_one_before_stays_known(
    add: Callable[..., int], client: Any
) -> None:
    assert promote(add("a")) == Promotion(1, "champion", "")
    assert aliases(client) == {"champion": 1, "challenger": 1}
    assert promote(add("b", champion=compared_with(client, 1))).alias == "champion"
    assert aliases(client) == {"champion": 2, "previous": 1, "challenger": 2}
    assert promote(2).alias == "champion"  # again: nothing to do
    assert actions() == [("promote", 1), ("promote", 2)]


def test_a_refused_version_stays_out_and_the_refusal_is_kept_once(
    add: Callable[..., int], client: Any
) -> None:
    add("a", passed=False)
    for _ in range(2):
        assert promote(1) == Promotion(1, "", "the gain is too small")
    assert "champion" not in aliases(client)
    assert actions() == [("refuse", 1)]


def test_a_refused_model_is_not_registered_where_the_gate_says_skip(
    make_candidate: Make, client: Any
) -> None:
    model, report = map(str, make_candidate("skipped", passed=False, refused="skip"))
    registry = {"model_name": "m"}
    version = steps.register(model, report, registry)
    assert version == steps.NOT_REGISTERED
    assert steps.promote(registry, version) == ""
    assert client.search_registered_models() == []
    model, report = map(str, make_candidate("passed", refused="skip"))
    assert steps.promote(registry, steps.register(model, report, registry)) == "champion"


def test_a_comparison_with_another_champion_asks_for_a_new_evaluation(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"))
    add("b", champion=compared_with(client, 1))
    add("c", champion=compared_with(client, 1))
    assert promote(2).alias == "champion"
    refused = promote(3)
    assert not refused.alias
    assert "compared with m version 1, but version 2 (entry 2, by me) is champion" in refused.reason
    assert not promote(3, expect_champion=2).alias  # expecting does not make it evidence
    assert aliases(client)["champion"] == 2


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"tuned": 0.8}, ""),
        ({"tuned": 0.79}, "its exact_match 0.7900 is worse than the 0.8000"),
        ({"tuned": 0.9, "eval_set": "other"}, "answered other test rows"),
        ({"tuned": 0.9, "metric": "chrf"}, "has no score in 'chrf'"),
        ({"tuned": 0.1, "eval_set": "other", "champion_rule": "ignore"}, ""),
    ],
)
def test_without_a_comparison_the_score_on_the_same_rows_decides(
    add: Callable[..., int], measured: dict[str, Any], says: str
) -> None:
    promote(add("a", tuned=0.8))
    add("b", **measured)
    if "no score" in says:
        with pytest.raises(RegistryError, match=says):
            promote(2)
        return
    promotion = promote(2)
    assert (promotion.alias == "champion") == (not says) and says in promotion.reason


@pytest.mark.parametrize(("tuned", "is_better"), [(1.1, True), (1.3, False)])
def test_of_a_loss_the_lower_one_is_better(
    add: Callable[..., int], tuned: float, is_better: bool
) -> None:
    loss = {"metric": "cross_entropy", "higher_is_better": False}
    promote(add("a", tuned=1.2, **loss))
    assert (promote(add("b", tuned=tuned, **loss)).alias == "champion") == is_better


def test_a_champion_that_could_not_be_compared_is_not_taken_for_one_that_was(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"))
    other_template = {**compared_with(client, 1), "compared": False}
    refused = promote(add("b", champion=other_template, eval_set="other"))
    assert "compared with its base only" in refused.reason


def test_naming_the_champion_promotes_what_was_not_compared(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"), expect_champion=NO_CHAMPION)
    add("b", tuned=0.5, eval_set="other")
    with pytest.raises(ConflictError, match=r"no version was expected .* but version 1 .*entry 1"):
        promote(2, expect_champion=NO_CHAMPION)
    assert promote(2, expect_champion=1).alias == "champion"
    assert aliases(client)["previous"] == 1


def test_a_refused_version_has_no_alias(add: Callable[..., int], client: Any) -> None:
    assert add("a", passed=False) == 1
    assert aliases(client) == {}
    assert promote(1).alias == ""
    assert add("b") == 2 and add("c", passed=False) == 3
    assert aliases(client) == {"challenger": 2}


def test_a_metric_of_any_name_is_registered_and_decides(add: Callable[..., int]) -> None:
    name = "pass@1 (strict)"  # MLflow takes neither @ nor brackets in a key
    promote(add("a", metric=name))
    assert promote(add("b", metric=name, tuned=0.7)).alias == ""
    assert [(m.metric, m.tuned_score) for m in models()] == [(name, "0.8000"), (name, "0.7000")]


def test_rollback_goes_back_in_one_command_and_history_stays(
    add: Callable[..., int], client: Any
) -> None:
    for name in "abc":
        promote(add(name))
    assert rollback("m", by="ann", reason="wrong prices") == 2
    assert aliases(client) == {"champion": 2, "previous": 1, "challenger": 3}
    assert rollback("m", by="ann") == 1
    assert aliases(client) == {"champion": 1, "challenger": 3}
    with pytest.raises(RegistryError, match="no champion before version 1"):
        rollback("m", by="ann")
    assert rollback("m", by="ann", to=3) == 3
    with pytest.raises(RegistryError, match=r"version 9 was never champion; .* 1, 2, 3"):
        rollback("m", by="ann", to=9)
    assert actions()[3:] == [("rollback", 2), ("rollback", 1), ("rollback", 3)]
    assert events("m")[3].outcome == "champion instead of 3: wrong prices"


def test_a_retried_pipeline_run_does_not_undo_a_rollback(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"))
    promote(add("b"), run_id="run-2")
    rollback("m", by="ann")
    again = promote(2, run_id="run-2")
    assert again.alias == "" and "this run made it champion (entry 2" in again.reason
    assert aliases(client)["champion"] == 1


def test_a_version_that_needs_approval_waits_for_it(add: Callable[..., int], client: Any) -> None:
    add("a", require_approval=True, run_id="run-1")
    waiting = promote(1)
    assert waiting.alias == "" and "tuneline approve m --version 1" in waiting.reason
    for _ in range(2):
        entry = approve("m", 1, by="ann", reason="looked at the report")
    tags = client.get_model_version("m", "1").tags
    assert (entry.by, entry.run_id) == ("ann", "run-1")
    assert entry.report_digest == tags["tuneline.report_digest"]
    assert tags["tuneline.approval"] == "approved by ann: looked at the report"
    assert promote(1).alias == "champion"
    assert actions() == [("refuse", 1), ("approve", 1), ("promote", 1)]


def delivery(value: str, *, key: str = APPROVE, at: float = 1e9) -> tuple[dict[str, str], bytes]:
    event = {
        "entity": "model_version_tag",
        "action": "set",
        "data": {"name": "m", "version": "1", "key": key, "value": value},
    }
    body = json.dumps(event).encode()
    sent = str(int(at))
    headers = {"X-MLflow-Delivery-Id": "7", "X-MLflow-Timestamp": sent}
    headers["X-MLflow-Signature"] = _generate_hmac_signature("secret", "7", sent, body.decode())
    return headers, body


@pytest.mark.parametrize(
    ("sent", "secret", "status"),
    [
        (delivery("Ada: I read it"), "secret", 200),
        (delivery("Ada: I read it"), "other", 401),
        (delivery("Ada: I read it", at=1e9 - 301), "secret", 401),
        (delivery("Ada"), "secret", 422),
        (delivery("Ada: I read it", key="colour"), "secret", 200),
        ((delivery("Ada: I read it")[0], b"{}"), "secret", 401),
        (({}, b""), "secret", 401),
    ],
)
def test_an_approval_by_webhook_needs_signature_time_and_reason(
    add: Callable[..., int],
    sent: tuple[dict[str, str], bytes],
    secret: str,
    status: int,
) -> None:
    add("a", require_approval=True)
    headers, body = sent
    assert receive(headers, body, secret, 1e9)[0] == status
    assert receive(headers, body, secret, 1e9)[0] == status  # MLflow may deliver twice
    approved = [("approve", 1)] if status == 200 and b"colour" not in body else []
    assert actions() == approved


def test_a_refused_version_can_not_be_approved(add: Callable[..., int]) -> None:
    add("a", passed=False)
    with pytest.raises(RegistryError, match="can't be approved: the gain is too small"):
        approve("m", 1, by="ann", reason="please")


def test_a_champion_is_copied_once_and_promoted_in_the_other_model(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"))
    for _ in range(2):
        copied = copy_and_promote("m", "production.m", Request(1, "me"))
        assert copied == Promotion(1, "champion", "")
    promote(add("b", champion=compared_with(client, 1)))
    promote(add("c", champion=compared_with(client, 2)))
    assert copy_and_promote("m", "production.m", Request(3, "me")).alias == "champion"
    assert aliases(client, "production.m") == {"champion": 2, "previous": 1}
    copy = client.get_model_version("production.m", "2")
    assert copy.tags["tuneline.copied_from"] == "models:/m/3"
    rollback("production.m", by="me")
    assert aliases(client, "production.m")["champion"] == 1
    assert aliases(client)["champion"] == 3


def test_registering_again_makes_no_second_version(make_candidate: Make, client: Any) -> None:
    model, report = make_candidate("a")
    for _ in range(2):
        assert register(model, report, "m", "run-1", Untracked()) == 1
    assert register(model, report, "m", "run-2", Untracked()) == 2
    assert register(model, report, "m", "run-1", Untracked()) == 1
    assert aliases(client)["challenger"] == 2
    assert len(client.search_logged_models(["1"])) == 2


def test_a_report_of_another_adapter_is_refused(make_candidate: Make, client: Any) -> None:
    (model, _), (_, report) = make_candidate("a"), make_candidate("b")
    with pytest.raises(ArtifactError, match="evaluates another adapter"):
        register(model, report, "m", "", Untracked())
    with pytest.raises(ArtifactError, match="is a eval_report; these can be registered: merged"):
        register(report, report, "m", "", Untracked())
    assert client.search_registered_models() == []


def folder_of(client: Any, version: int) -> Path:
    uri = client.get_model_version_download_uri("m", str(version))
    return Path(uri.removeprefix("file://"))


def tamper_report(folder: Path) -> None:
    path = folder / "evaluation" / "report.json"
    path.write_text(path.read_text().replace("0.8", "0.9"))


def tamper_report_and_manifest(folder: Path) -> None:
    from tuneline import artifacts

    report = folder / "evaluation"
    manifest = json.loads((report / "manifest.json").read_text())
    (report / "manifest.json").unlink()
    tamper_report(folder)
    artifacts.seal(
        report, kind="eval_report", config=manifest["config"], base_model=manifest["base_model"],
        inputs=manifest["inputs"],
    )  # fmt: skip


def tamper_loader(folder: Path) -> None:
    path = folder / "MLmodel"
    path.write_text(path.read_text().replace("mlflow.transformers", "os"))


def delete_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (tamper_report, "report.json differs from its SHA-256"),
        (tamper_report_and_manifest, r"tag tuneline\.report_digest says 'sha256:"),
        (tamper_loader, r"tag tuneline\.package_digest says"),
        (delete_weights, "model.safetensors is missing"),
        (shutil.rmtree, "has no files at .* deleted; register"),
    ],
)
def test_a_version_whose_files_changed_is_not_promoted(
    add: Callable[..., int], client: Any, tamper: Callable[[Path], None], says: str
) -> None:
    promote(add("a"))
    add("b")
    folder = folder_of(client, 2)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    copy.rename(folder)
    tamper(folder)
    before = aliases(client)
    with pytest.raises(RegistryError, match=says):
        promote(2)
    assert aliases(client) == before and actions() == [("promote", 1)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("gate", "passed"), ("tuned_exact_match", "0.9900"), ("compared_digest", "sha256:x")],
)
def test_a_tag_that_says_more_than_the_report_is_noticed(
    add: Callable[..., int], client: Any, key: str, value: str
) -> None:
    add("a", passed=False)
    client.set_model_version_tag("m", "1", "tuneline.gate", "passed")
    client.set_model_version_tag("m", "1", f"tuneline.{key}", value)
    with pytest.raises(RegistryError, match=r"its tag tuneline\.\w+ says '.*', its files say"):
        promote(1)
    assert "champion" not in aliases(client)


def test_what_does_not_exist_or_has_no_verdict_is_named(
    add: Callable[..., int], client: Any
) -> None:
    with pytest.raises(RegistryError, match="no model m is registered"):
        promote(1)
    add("a")
    with pytest.raises(RegistryError, match="m has no version 7; its last versions are 1"):
        promote(7)
    client.create_registered_model("plain")
    client.create_model_version("plain", "models:/m/1")
    with pytest.raises(RegistryError, match="no verdict of a gate"):
        promote(1, "plain")
    for action in (lambda: events("absent"), lambda: rollback("absent", by="me")):
        with pytest.raises(RegistryError, match="absent"):
            action()


def test_an_alias_that_was_moved_by_hand_is_noticed_and_set_right(
    add: Callable[..., int], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneline.register.champion._DOUBT_SECONDS", 0.0)
    for name in "abc":
        add(name)
    promote(1)
    client.set_registered_model_alias("m", "champion", "2")
    with pytest.raises(RegistryError, match="names version 2, but by the history version 1"):
        promote(3)
    assert rollback("m", by="me", to=1) == 1
    assert aliases(client)["champion"] == 1
    client.set_registered_model_alias("m", "champion", "2")
    assert promote(3, expect_champion=2).alias == "champion"
    assert aliases(client)["previous"] == 2


def test_a_deleted_champion_does_not_stop_a_rollback(
    add: Callable[..., int], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneline.register.champion._DOUBT_SECONDS", 0.0)
    promote(add("a"))
    promote(add("b"))
    client.delete_model_version("m", "2")
    with pytest.raises(RegistryError, match="the alias champion is gone"):
        rollback("m", by="me")
    assert rollback("m", by="me", to=1) == 1
    assert aliases(client)["champion"] == 1


def test_who_comes_next_completes_a_promotion_whose_process_died(
    add: Callable[..., int], client: Any
) -> None:
    promote(add("a"))
    add("b")
    add("c", champion=compared_with(client, 2))
    seen = history.read(client, "m")
    last = seen.last_move
    assert last is not None
    dead = history.Entry("promote", 2, "dead", builds_on=last.number, replaces=1)
    history.append(client, seen, dead)
    assert aliases(client)["champion"] == 1  # the one before serves meanwhile
    assert promote(3).alias == "champion"
    assert aliases(client) == {"champion": 3, "previous": 2, "challenger": 3}
    settle(client, "m")
    assert aliases(client)["champion"] == 3


def test_pages_of_a_long_history_are_put_together(
    add: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcde":
        promote(add(name))
    whole = events("m")
    monkeypatch.setattr(history, "_PAGE", 2)
    assert events("m") == whole and [event.number for event in whole] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["changed", "removed", "foreign"])
def test_a_history_that_was_changed_is_not_promoted_on(
    add: Callable[..., int], client: Any, fault: str
) -> None:
    for name in "abc":
        promote(add(name))
    if fault == "changed":
        client.set_model_version_tag("m.history", "1", "tuneline.by", "somebody else")
    elif fault == "removed":
        client.delete_model_version("m.history", "2")
    else:
        client.create_model_version("m.history", "models:/m/1")
    with pytest.raises(RegistryError, match=r"m\.history can't be trusted: "):
        promote(1)
    assert aliases(client)["champion"] == 3


def test_models_lists_aliases_and_scores_and_no_history(add: Callable[..., int]) -> None:
    promote(add("a"))
    add("b", passed=False, tuned=0.2)
    listed = models()
    assert [(m.model_name, m.version, m.aliases, m.tuned_score, m.gate) for m in listed] == [
        ("m", 1, ("champion", "challenger"), "0.8000", "passed"),
        ("m", 2, (), "0.2000", "refused"),
    ]


def test_the_commands_do_what_they_say(
    make_candidate: Make, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = make_candidate("a")
    given = ["--model", str(model), "--report", str(report), "--name", "m"]
    assert main(["register", *given, "--require-approval"]) == 0
    assert main(["promote", "m", "--version", "1"]) == 0
    assert "waits for an approval" in capsys.readouterr().out
    by = ["--by", "ann", "--reason", "fine"]
    assert main(["approve", "m", "--version", "1", *by]) == 0
    assert main(["promote", "m", "--version", "1", "--to-model", "prod.m", "--by", "bob"]) == 0
    assert aliases(client, "prod.m")["champion"] == 1
    assert main(["promote", "m", "--version", "1", "--expect-champion", "5"]) == 0
    assert main(["rollback", "m"]) == 1
    assert "nothing to go back to" in capsys.readouterr().err
    assert main(["history", "m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["entry", "when", "(UTC)"]
    assert [line.split()[2:5] for line in lines[1:]] == [
        ["refuse", "1", line_by] for line_by in [lines[1].split()[4]]
    ] + [["approve", "1", "ann"], ["promote", "1", "bob"]]
    assert main(["history", "m", "--json"]) == 0
    assert [e["action"] for e in json.loads(capsys.readouterr().out)][1:] == ["approve", "promote"]
    assert main(["models"]) == 0
    assert "champion, challenger" in capsys.readouterr().out
    assert main(["models", "absent"]) == 1


def test_a_model_can_not_take_the_name_of_a_history(make_candidate: Make) -> None:
    from tuneline import steps

    model, report = make_candidate("a")
    with pytest.raises(RecipeError, match=r"must not end with \.history"):
        steps.register(str(model), str(report), {"model_name": "m.history"})
    with pytest.raises(RecipeError, match="another model than model_name"):
        steps.promote({"model_name": "m", "to_model": "m"}, 1)
