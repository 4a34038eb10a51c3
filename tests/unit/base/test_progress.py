import os
import pty
import subprocess
import sys

import pytest

from gradnoise.base.progress import progress

PROGRAM = (
    "from gradnoise.base.progress import progress\n"
    "with progress('race/b016', 1000) as advance:\n    advance(600)\n    advance(150)\n"
)


def test_a_log_gets_plain_lines_at_most_one_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("race/b016", 1000) as advance:
        for _ in range(75):
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "race/b016: 100 of 1,000 sequences"
    assert lines[-1] == "race/b016: finished after 750 sequences"
    assert len(lines) == 8


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", PROGRAM], stderr=theirs, check=True, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "race/b016" in shown
    assert "━" in shown
    assert "100%" in shown
    assert "sequences" not in shown
