"""Alerts fire when they should, as Prometheus' own tool reads them."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

WHEN = Path(__file__).with_name("alerts.yaml")
OF_WHAT_IS_THERE = {"TunelineRunFailed", "TunelineMlflowDown", "TunelineVolumeNearlyFull"}
"""Of a figure that is there as soon as its object is."""


def test_alerts_fire_when_they_should_also_before_anything_has_worked(
    components: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    lacking: Callable[[str, str], NoReturn],
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        lacking("promtool", "promtool is not installed: apt-get install prometheus")
    (spec,) = (t["spec"] for t in components["prometheus"] if t["kind"] == "PrometheusRule")
    rules = [
        {key: value for key, value in rule.items() if key != "annotations"}  # their texts
        for rule in spec["groups"][0]["rules"]
    ]
    groups = [{"name": "tuneline", "rules": rules}]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    shutil.copy(WHEN, tmp_path)
    done = subprocess.run(
        [promtool, "test", "rules", WHEN.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_about_what_has_never_worked_is_tried(
    components: dict[str, list[dict[str, Any]]],
) -> None:
    (spec,) = (t["spec"] for t in components["prometheus"] if t["kind"] == "PrometheusRule")
    tried = {
        one["alertname"]
        for case in yaml.safe_load(WHEN.read_text())["tests"]
        for one in case["alert_rule_test"]
    }
    known = {rule["alert"] for rule in spec["groups"][0]["rules"]}
    assert tried == known - OF_WHAT_IS_THERE
