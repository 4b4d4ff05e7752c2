"""CI leaves nothing out in silence."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]


def test_what_is_required_fails_where_it_is_lacking_and_is_skipped_else(
    lacking: Callable[[str, str], NoReturn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_REQUIRE", "services checkov")
    with pytest.raises(pytest.fail.Exception, match="asks for checkov: no network"):
        lacking("checkov", "no network")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        lacking("promtool", "not installed")


def script(function: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The first lines of .ci/run, which define its functions, and one call."""
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    lines = text[text.index("export TUNELINE_REQUIRE") : text.index("# The image is built")]
    return subprocess.run(
        ["bash", "-euc", f"{lines}\n{function}\necho went on"],
        env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_ci_requires_all_that_a_test_may_lack() -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        if file != Path(__file__)
        for name in re.findall(r'lacking\("(\w+)", ', file.read_text(encoding="utf-8"))
    }
    done = script('echo "$TUNELINE_REQUIRE"')
    assert known == {"services", "checkov", "promtool"}
    assert set(done.stdout.splitlines()[0].split()) == known | {"containers"}


def test_ci_ends_without_what_it_requires_unless_told_otherwise() -> None:
    done = script('lacking containers "no Docker"')
    assert done.returncode == 1 and "went on" not in done.stdout
    assert "no Docker" in done.stderr and "asks for containers" in done.stderr
    done = script('lacking containers "no Docker"', TUNELINE_REQUIRE="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "no Docker\n")
