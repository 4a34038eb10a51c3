"""What the auditor's Git lets nobody fool it with."""

import subprocess
from pathlib import Path

import pytest

from gradnoise.provenance.audit.findings import Breach
from gradnoise.provenance.audit.git import Git


def git(*arguments: str) -> str:
    identity = [f"-c user.{name}=test@example.org" for name in ("name", "email")]
    command = ["git", *" ".join(identity).split(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository of three commits in the working folder: plan, other, run."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    found = []
    for name in ("plan", "other", "run"):
        Path(name).write_text(f"{name}\n")
        git("add", ".")
        git("commit", "--quiet", "--message", name)
        found.append(git("rev-parse", "HEAD"))
    return found


def test_whole_history_in_order(commits: list[str]) -> None:
    repository = Git()
    assert list(repository.history) == commits
    assert repository.head == commits[-1]
    assert repository.touching("other") == [commits[1]]
    assert repository.is_ancestor(commits[0], commits[2])
    assert not repository.is_ancestor(commits[2], commits[0])
    assert repository.tampering == []
    assert repository.hidden == []


def test_files_of_commits_by_their_bytes(commits: list[str]) -> None:
    places = [(commits[0], "plan"), (commits[0], "other"), (commits[1], "other"), (commits[2], "")]
    assert Git().blobs(places) == [b"plan\n", None, b"other\n", None]
    assert set(Git().listing(commits[1], "other", "run")) == {"other"}


def test_replaced_parents_are_told_and_not_believed(commits: list[str]) -> None:
    late = git("commit-tree", "HEAD^{tree}", "-m", "a plan made later")
    git("replace", "--graft", commits[2], late)
    # Plain Git believes it.
    assert (
        subprocess.run(["git", "merge-base", "--is-ancestor", late, commits[2]], check=False).returncode == 0
    )
    assert not Git().is_ancestor(late, commits[2])
    assert list(Git().history) == commits
    assert "replaces an object" in Git().tampering[0]


def test_shallow_clone_and_grafts_are_told(
    commits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git("clone", "--quiet", "--depth", "1", f"file://{tmp_path}", "copy")
    monkeypatch.chdir("copy")
    assert "shallow" in Git().tampering[0]
    assert commits[0] not in Git().history
    monkeypatch.chdir("..")
    Path(".git/info").mkdir(exist_ok=True)
    Path(".git/info/grafts").write_text(f"{commits[2]}\n")
    assert "grafts" in Git().tampering[0]


@pytest.mark.parametrize("flag", ["--skip-worktree", "--assume-unchanged"])
def test_hidden_edits_are_told(commits: list[str], flag: str) -> None:
    git("update-index", flag, "plan")
    Path("plan").write_text("another plan\n")
    assert git("status", "--porcelain") == ""
    assert Git().hidden == ["plan"]


def test_user_settings_and_outer_repositories_have_no_say(
    commits: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert Git().head == commits[-1]
    monkeypatch.delenv("GIT_DIR")
    Path("inside").mkdir()
    monkeypatch.chdir("inside")
    with pytest.raises(Breach, match="git rev-parse"):
        _ = Git().head
