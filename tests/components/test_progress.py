"""What a person sees: one line that changes in a terminal, plain lines elsewhere."""

import os
import pty
import subprocess
import sys

_SAYS = """
from tuneline.progress import complain, report, tick
report("== finetune_lora")
tick("step 1/2  " + "x" * 200)
tick("step 2/2")
report("trained 9 tokens")
tick("step 3/3")
complain("it failed")
"""


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(sys.path)
    return {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "60", **more}


def _in_a_terminal(**more: str) -> str:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", _SAYS], stdout=theirs, stderr=theirs, env=_environment(**more)
        )
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = terminal.read(4096)
            except OSError:  # Linux says so when the other side has closed
                break
            if not piece:
                break
            output += piece
        assert process.wait() == 0
    return output.decode().replace("\r\n", "\n")


def test_a_terminal_shows_one_line_that_changes() -> None:
    wide, *rest = _in_a_terminal().split("\r\033[K")[1:]
    assert wide == ("  step 1/2  " + "x" * 200)[:59], "none that wraps"
    assert rest == [
        "  step 2/2",
        "  trained 9 tokens\n",
        "  step 3/3",
        "error: it failed\n",
    ]


def test_a_pod_log_and_a_terminal_without_escapes_get_plain_lines() -> None:
    plain = subprocess.run(
        [sys.executable, "-c", _SAYS],
        capture_output=True,
        text=True,
        env=_environment(),
        check=True,
    ).stdout
    lines = plain.splitlines()
    assert lines[0] == "[tuneline] == finetune_lora" and lines[2] == "[tuneline~] step 2/2"
    assert len(lines) == 5 and "\r" not in plain
    assert _in_a_terminal(TERM="dumb") == plain + "error: it failed\n"
