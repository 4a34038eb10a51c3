import os
import pty
import re
import subprocess
import sys

import pytest

from gradnoise.base.progress import progress

PROGRAM = (
    "from gradnoise.base.progress import progress\n"
    "with progress('race/b016', 1000) as told:\n    told.advance(600)\n    told.skip({skipped})\n"
)


def test_a_log_gets_plain_lines_at_most_one_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("race/b016", 1000) as told:
        for _ in range(75):
            told.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "race/b016: 100 of 1,000 sequences"
    assert lines[-1] == "race/b016: finished after 750 sequences"
    assert len(lines) == 8


def test_a_log_counts_only_what_will_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("race/b016", 1000) as told:
        told.advance(90)
        told.skip(400)
        told.advance(510)
    with progress("all in checkpoints", 1000) as told:
        told.skip(1000)
    assert capsys.readouterr().err.splitlines() == [
        "race/b016: 90 of 600 sequences",
        "race/b016: 600 of 600 sequences",
        "race/b016: finished after 600 sequences",
        "all in checkpoints: finished after 0 sequences",
    ]


@pytest.mark.parametrize(("skipped", "percent"), [(0, "60%"), (200, "75%"), (400, "100%")])
def test_a_terminal_gets_a_bar_that_ends_where_the_work_does(skipped: int, percent: str) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", PROGRAM.format(skipped=skipped)],
        stderr=theirs,
        check=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "race/b016" in shown
    assert "━" in shown
    assert re.findall(r"\d+%", shown)[-1] == percent
    assert "sequences" not in shown
