import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.files import atomic, canonical_json, read_json, sha256, write_bytes, write_json


def test_a_written_file_is_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    write_bytes(tmp_path / "folder" / "file", b"content")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["file"]
    assert (tmp_path / "folder" / "file").read_bytes() == b"content"


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")

    def interrupted() -> None:
        with atomic(tmp_path / "file") as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    """The kernel refuses the write: a limit on file size stands in for the end of the disk."""
    write_bytes(tmp_path / "table", b"old")
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from gradnoise.base.files import write_bytes\n"
        "from gradnoise.base.errors import InputError\n"
        "try:\n    write_bytes(sys.argv[1], b'x' * 100_000)\n"
        "except InputError as fault:\n    print(fault)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "table")], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path / 'table'}: cannot be written, no space left: free some disk space\n"
    assert [p.name for p in tmp_path.iterdir()] == ["table"]
    assert (tmp_path / "table").read_bytes() == b"old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_at_the_rename_is_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="no space left: free some disk space"):
        write_bytes(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_mid_write_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom gradnoise.base.files import atomic\n"
        "with atomic(sys.argv[1]) as t:\n"
        "    t.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    write_bytes(target, b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "the next attempt clears the leftover"


def test_json_is_canonical_and_refuses_nan(tmp_path: Path) -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_truncated_json_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: rebuild it"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"a": [1, ')
    with pytest.raises(InputError, match="half.json: is not whole JSON: delete it"):
        read_json(tmp_path / "half.json")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
