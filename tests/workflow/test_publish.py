"""Versions leave this machine only when they are fresh, and arrive whole, through Git alone or over SSH."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workflow.project import NAME, Project, stop

from gradnoise.base import layout

pytestmark = pytest.mark.slow
# The environment is there already: `make` must not build another one.
PUBLISH = ("make", "-o", ".venv/installed", "publish")


def test_publish_refuses_a_stale_study_and_publishes_a_fresh_one(copy: Project, tmp_path: Path) -> None:
    commits = copy.git("rev-list", "--count", "HEAD").out
    copy.edit("src/gradnoise/report/report.html.j2", lambda text: f"{text}<!-- Another end. -->\n")
    copy.git("commit", "--all", "--quiet", "--message", "Another report")
    refused = copy.try_run(*PUBLISH)
    assert refused.status != 0
    assert "publish: results are stale: run make study first" in refused.err, refused
    assert int(copy.git("rev-list", "--count", "HEAD").out) == int(commits) + 1
    assert copy.git("status", "--porcelain").out == ""

    copy.snakemake()
    published = copy.run(*PUBLISH)
    assert "dvc-store grew by " in published.out, published
    assert int(copy.git("rev-list", "--count", "HEAD").out) == int(commits) + 2
    assert f"study {NAME}" in copy.git("log", "-1", "--format=%s").out
    assert copy.git("status", "--porcelain").out == ""
    copy.assert_fresh()

    again = copy.run(*PUBLISH)
    assert "dvc-store grew by 0 kB" in again.out, again
    assert int(copy.git("rev-list", "--count", "HEAD").out) == int(commits) + 2
    assert copy.git("status", "--porcelain").out == ""

    clone = copy.clone(tmp_path / "clone")
    clone.dvc("pull", "--quiet")
    assert clone.science() == copy.science()
    assert "Another end" in (clone.path / layout.report(NAME)).read_text()


SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@pytest.fixture
def ssh_server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A private SSH server on loopback with keys of its own: its port and the user's key."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs sshd and ssh-keygen (openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # OpenSSH asks for it where it runs as root
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "config")], stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                break
            time.sleep(0.02)
        assert server.poll() is None, (folder / "log").read_text()
        yield port, folder / "user"
    finally:
        stop(server)


def test_artifacts_travel_over_ssh(copy: Project, ssh_server: tuple[int, Path], tmp_path: Path) -> None:
    port, key = ssh_server
    store = tmp_path / "lab"
    # What is shared is in Git; whose key it is stays on the machine.
    copy.dvc("remote", "add", "--default", "lab", f"ssh://{getpass.getuser()}@127.0.0.1:{port}{store}")
    copy.git("rm", "-r", "--quiet", "--cached", "dvc-store")
    shutil.rmtree(copy.path / "dvc-store")
    copy.git("commit", "--all", "--quiet", "--message", "Artifacts on the lab's server")
    copy.dvc("remote", "modify", "--local", "lab", "keyfile", str(key))
    pushed = copy.dvc("push")
    assert "pushed" in pushed.text, pushed
    assert any(path.is_file() for path in store.rglob("*"))

    clone = copy.clone(tmp_path / "clone")
    clone.dvc("remote", "modify", "--local", "lab", "keyfile", str(key))
    clone.dvc("pull")
    assert clone.science() == copy.science()
    clone.assert_fresh()
