"""What the repository's history shows of a study: commits, and whether an outcome was there to be seen."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.registration.lockfile import LockCommit

# What jobs write and DVC stores: it differs from HEAD while a study is built.
_BUILT = (":(exclude)results", ":(exclude)dvc.lock", ":(exclude)dvc-store")
# Settings that would have Git look at another repository.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")


def git(*arguments: str) -> str:
    """What Git says in this folder, whatever `git replace` pretends; `InputError` where it cannot.

    A repository that merely contains this folder says nothing about it.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    kept |= {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_CEILING_DIRECTORIES": str(Path.cwd().parent)}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=kept, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise InputError(
            f"git {arguments[0]}", said[0] if said else "failed", "run in the study's repository"
        ) from error
    return done.stdout


def head() -> LockCommit:
    """The commit that is checked out and its tree."""
    sha, tree = git("rev-parse", "HEAD", "HEAD^{tree}").split()
    return LockCommit(sha=sha, tree=tree)


def check_committed(paths: Sequence[str]) -> None:
    """Refuse tracked files that differ from HEAD, results excepted, and any of `paths` that is not in HEAD.

    `paths` are compared by their bytes: Git can be told to overlook an edit (`--skip-worktree`).
    """
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_BUILT).splitlines()
    if changed:
        raise InputError(changed[0][3:], "differs from HEAD", "commit it, or put it back with git checkout")
    blobs = {}
    for line in git("ls-tree", "-r", "-z", "HEAD").split("\0"):
        if line:
            about, path = line.split("\t", 1)
            blobs[path] = about.split()[2]
    found = git("hash-object", "--no-filters", "--", *paths).split()
    for path, blob in zip(paths, found, strict=True):
        if blobs.get(path) != blob:
            raise InputError(path, "is not what HEAD holds", "commit it, or put it back with git checkout")


def outcome_seen(study: str) -> str | None:
    """Where an outcome of the study is, or once was, to be seen; None while there is none anywhere.

    An outcome is a file of scores, runs or figures in the work tree, a finished attempt at a job that makes
    one, any file of the study in any commit, or trained runs in any version of dvc.lock. Raises `InputError`
    in a shallow clone, which cannot tell.
    """
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        raise InputError("history", "is cut short (shallow clone)", "run git fetch --unshallow first")
    folder = f"results/{study}"
    for made in ("runs", "scores", "noise", "analysis", "figures", "report"):
        file = next((path for path in sorted(Path(folder, made).rglob("*")) if path.is_file()), None)
        if file is not None and file.name != ".gitignore":
            return file.as_posix()
    for path in sorted(Path(layout.attempts(study)).glob("*.json")):
        if _finished_outcome(path):
            return path.as_posix()
    commit = git("log", "--all", "--max-count=1", "--format=%h", "--", folder).strip()
    if commit:
        return f"{folder} in commit {commit}"
    runs = f"path: {folder}/runs"
    commit = git("log", "--all", "--max-count=1", "--format=%h", f"-S{runs}", "--", "dvc.lock").strip()
    return f"{folder}/runs in dvc.lock of commit {commit}" if commit else None


def _finished_outcome(path: Path) -> bool:
    """Whether a record tells of a finished job that shows outcomes; a record that cannot be read may."""
    if path.stat().st_size == 0:
        return False  # killed between reserving the name and writing
    try:
        record = json.loads(path.read_bytes())
        return bool(record["status"] == "finished" and record["phase"] != "prepare")
    except (ValueError, KeyError, TypeError):
        return True
