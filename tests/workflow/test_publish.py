"""Versions leave this machine only when they are fresh, and arrive whole, through Git alone or over SSH."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workflow.project import NAME, ROOT, Project, stop

from gradnoise.base import layout
from gradnoise.provenance.metadata import ignore_pattern

pytestmark = pytest.mark.slow
TEMPLATE = "src/gradnoise/report/report.html.j2"


def another_end(text: str) -> str:
    return f"{text}<!-- Another end. -->\n"


def commits(project: Project) -> int:
    return int(project.git("rev-list", "--count", "HEAD").out)


def tag_as_registered(project: Project) -> str:
    """The study becomes a registered one; the tag that it is to be frozen at."""
    project.edit(f"preregistration/{NAME}.yaml", lambda text: text.replace('"rehearsal"', '"registered"'))
    return f"published-{NAME}"


def test_only_a_fresh_and_committed_study_is_published(copy: Project, tmp_path: Path) -> None:
    before = commits(copy)
    copy.edit(TEMPLATE, another_end)
    copy.git("commit", "--all", "--quiet", "--message", "Another report")
    refused = copy.make("publish")
    assert refused.status == 2
    assert "publish: results are stale: run make study first" in refused.err, refused
    stale = copy.make("fresh")
    assert stale.status == 2, stale
    assert f"stale: study {NAME} is not what this code gives: run make study, then make publish" in stale.err
    assert commits(copy) == before + 1
    assert copy.git("status", "--porcelain").out == ""

    copy.snakemake()
    unrecorded = copy.make("fresh")
    assert unrecorded.status == 2, unrecorded
    assert f"stale: dvc.lock does not record study {NAME} as it is here: run make publish" in unrecorded.err
    published = copy.make("publish")
    assert published.status == 0, published
    assert "dvc-store grew by " in published.out, published
    assert commits(copy) == before + 2
    assert f"study {NAME}" in copy.git("log", "-1", "--format=%s").out
    assert copy.git("status", "--porcelain").out == ""
    copy.assert_fresh()
    fresh = copy.make("fresh")
    assert fresh.status == 0, fresh
    assert f"fresh: study {NAME}" in fresh.out

    again = copy.make("publish")
    assert again.status == 0, again
    assert "dvc-store grew by 0 kB" in again.out, again
    assert commits(copy) == before + 2
    assert copy.git("status", "--porcelain").out == ""

    clone = copy.clone(tmp_path / "clone")
    clone.dvc("pull", "--quiet")
    assert clone.science() == copy.science()
    assert "Another end" in (clone.path / layout.report(NAME)).read_text()


def test_a_stray_file_is_never_published_nor_fresh(copy: Project) -> None:
    """The manifest is there, so Snakemake has nothing to do and looks at nothing."""
    before = commits(copy)
    for stray in (f"results/{NAME}/notes.txt", f"results/{NAME}/figures/old.svg", "results/notes.txt"):
        (copy.path / stray).write_text("Not ours.\n")
        copy.assert_nothing_to_do()
        for target in ("publish", "fresh"):
            refused = copy.make(target)
            assert refused.status == 2, refused
            said = f"gradnoise: {stray}: no rule writes it: move it out of results/ or delete it"
            assert said in refused.err.splitlines(), refused
        (copy.path / stray).unlink()
    assert commits(copy) == before
    copy.assert_fresh()


def test_what_was_built_before_its_code_was_committed_is_not_published(copy: Project) -> None:
    copy.edit(TEMPLATE, another_end)
    copy.snakemake()
    copy.git("commit", "--all", "--quiet", "--message", "Another report")
    copy.assert_nothing_to_do()
    before = commits(copy)
    refused = copy.make("publish")
    assert refused.status == 2, refused
    report = layout.report(NAME)
    said = f"gradnoise: {report}: report-report-0002 wrote it in a work tree with uncommitted changes: "
    assert [line for line in refused.err.splitlines() if line.startswith(said)], refused
    assert commits(copy) == before

    (copy.path / report).unlink()
    copy.snakemake()
    published = copy.make("publish")
    assert published.status == 0, published
    assert commits(copy) == before + 1


def test_ci_asks_whether_the_published_study_is_fresh_and_audits_it() -> None:
    """Read and not run: it is the whole suite. No failure is passed over."""
    text = (ROOT / ".ci/run").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    asked = lines.index("make test")
    assert lines[asked : asked + 3] == ["make test", ".venv/bin/dvc pull --quiet", "make fresh"]
    audit = '  gradnoise audit --study "$(python workflow/scripts/published.py name)"'
    assert audit in lines[asked + 3 :]
    assert not any("||" in line for line in lines[asked:])


@pytest.mark.parametrize("state", ["modified", "staged", "untracked"])
def test_publish_refuses_sources_that_are_not_committed(copy: Project, state: str) -> None:
    """The artifacts would be in Git and the code that made them would not."""
    changed = "notes.md" if state == "untracked" else TEMPLATE
    if state == "untracked":
        (copy.path / changed).write_text("Not ignored.\n")
    else:
        copy.edit(TEMPLATE, another_end)
    if state == "staged":
        copy.git("add", "--all")
    if state == "modified":
        copy.snakemake()  # fresh, as far as Snakemake knows
    status, before = copy.git("status", "--porcelain").out, commits(copy)
    refused = copy.make("publish")
    assert refused.status == 2, refused
    assert f"publish: {changed}: differs from HEAD: commit it first" in refused.err.splitlines(), refused
    assert commits(copy) == before
    assert copy.git("status", "--porcelain").out == status


def test_a_registered_study_is_judged_at_its_tag(copy: Project) -> None:
    tag = tag_as_registered(copy)
    copy.git("commit", "--all", "--quiet", "--message", "Registered")
    refused = copy.make("fresh")
    assert refused.status == 2, refused
    assert f"fresh: {tag}: no such tag" in refused.err, refused

    copy.git("tag", tag)
    stale = copy.make("fresh")
    assert stale.status == 2, stale
    assert f"stale: study {NAME} is not what this code gives" in stale.err, stale
    # At v1 all is fresh; that today's code has moved on does not matter.
    copy.git("tag", "--force", tag, "v1")
    copy.edit(TEMPLATE, another_end)
    fresh = copy.make("fresh")
    assert fresh.status == 0, fresh
    assert f"fresh: study {NAME} at {tag}" in fresh.out
    assert len(copy.git("worktree", "list").out.splitlines()) == 1


def test_clean_study_removes_the_published_study_and_no_other(copy: Project) -> None:
    folders = [copy.path / folder for folder in ("results", "scratch", "logs")]
    metadata = copy.path / ".snakemake/metadata"
    other = [folder / f"{NAME}-2/kept" for folder in folders]
    other.append(metadata / urlsafe_b64encode(f"results/{NAME}-2/kept".encode()).decode())
    for path in other:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Kept.\n")
    # As for every study that is not the published one.
    with (copy.path / ".dvcignore").open("a") as ignored:
        ignored.write(f"{ignore_pattern(f'{NAME}-2')}\n")
    config, science = copy.path / "config/config.yaml", copy.science()
    good = config.read_text()
    for fault in ("study: ''\n", "study: ..\n", "", "study: '*'\n"):
        config.write_text(fault)
        refused = copy.make("clean-study")
        assert refused.status == 2, refused
        assert "config/config.yaml: " in refused.err, refused
        assert copy.science() == science
    config.write_text(good)

    cleaned = copy.make("clean-study")
    assert cleaned.status == 0, cleaned
    assert [folder / NAME for folder in folders if (folder / NAME).exists()] == []
    assert {path for path in metadata.rglob("*") if path.is_file()} == {other[-1]}
    assert [path for path in other if not path.is_file()] == []
    # DVC's cache still has what was published.
    copy.git("checkout", "--quiet", "results")
    copy.dvc("checkout", "--quiet")
    assert copy.science() == science
    copy.assert_fresh()


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
