"""Git as a reviewer reads it: plumbing only, no replaced objects, no settings of a user, no hooks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from gradnoise.provenance.audit.findings import Breach

# A forged commit-graph could tell of other parents than the commits do.
_CONFIG = ("core.commitGraph=false", "core.fsmonitor=false", "safe.directory=*")
_SECONDS = 60


class Git:
    """The repository whose top folder is the working folder."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self._environment = kept | {
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_TERMINAL_PROMPT": "0",
            # A repository that merely contains this folder says nothing about it.
            "GIT_CEILING_DIRECTORIES": str(Path.cwd().parent),
            "LC_ALL": "C",
        }

    @cached_property
    def head(self) -> str:
        """The commit that is checked out."""
        return self._lines("rev-parse", "--verify", "HEAD^{commit}")[0]

    @cached_property
    def history(self) -> dict[str, int]:
        """Every commit of the history that is checked out, with its place in it: parents come first."""
        commits = self._lines("rev-list", "--topo-order", "--reverse", "HEAD")
        return {commit: place for place, commit in enumerate(commits)}

    @cached_property
    def tampering(self) -> list[str]:
        """What would make Git tell another history than its commits do."""
        folder = Path(self._lines("rev-parse", "--git-common-dir")[0])
        found = [f"{ref} replaces an object" for ref in self._lines("for-each-ref", "refs/replace")]
        if (folder / "shallow").exists():
            found.append("the clone is shallow: fetch the whole history (git fetch --unshallow)")
        if (folder / "info" / "grafts").exists():
            found.append(f"{folder / 'info' / 'grafts'} gives commits other parents")
        return found

    @cached_property
    def hidden(self) -> list[str]:
        """Tracked files whose edits `git status` is told not to see: skip-worktree and assume-unchanged."""
        listed = self._run("ls-files", "-v", "-z").decode().split("\0")
        return [entry[2:] for entry in listed if entry and entry[0] not in "HMRCK"]

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `older` is in the history of `newer`."""
        answer = self._start("merge-base", "--is-ancestor", older, newer)
        return answer.returncode == 0

    def touching(self, *paths: str) -> list[str]:
        """Commits of the history that changed one of the paths, the oldest first."""
        return self._lines("rev-list", "--topo-order", "--reverse", "--full-history", "HEAD", "--", *paths)

    def listing(self, commit: str, *paths: str) -> dict[str, str]:
        """Object names of the files under the paths in a commit."""
        listed = self._run("ls-tree", "-r", "-z", commit, "--", *paths).decode().split("\0")
        rows = [entry.split("\t", 1) for entry in listed if entry]
        return {path: about.split()[2] for about, path in rows}

    def tree(self, commit: str) -> str:
        """Object name of a commit's tree."""
        return self._lines("rev-parse", "--verify", f"{commit}^{{tree}}")[0]

    def blob(self, commit: str, path: str) -> bytes | None:
        """Bytes of a file in a commit; None where it has none."""
        return self.blobs([(commit, path)])[0]

    def blobs(self, places: Sequence[tuple[str, str]]) -> list[bytes | None]:
        """The same of many (commit, path) at once."""
        asked = [f"{commit}:{path}" for commit, path in places]
        if any("\n" in name for name in asked):
            raise Breach("a path has a line break in it")
        answer = self._run("cat-file", "--batch", given="".join(f"{name}\n" for name in asked).encode())
        found: list[bytes | None] = []
        for _ in asked:
            head, _, answer = answer.partition(b"\n")
            about = head.split()
            if about[-1:] == [b"missing"] or len(about) != 3:
                found.append(None)
                continue
            size = int(about[2])
            found.append(answer[:size] if about[1] == b"blob" else None)
            answer = answer[size + 1 :]
        return found

    def _lines(self, *arguments: str) -> list[str]:
        return self._run(*arguments).decode().splitlines()

    def _run(self, *arguments: str, given: bytes = b"") -> bytes:
        answer = self._start(*arguments, given=given)
        if answer.returncode:
            raise Breach(f"git {arguments[0]}: {answer.stderr.decode(errors='replace') or 'failed'}")
        return answer.stdout

    def _start(self, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        settings = [word for setting in _CONFIG for word in ("-c", setting)]
        try:
            return subprocess.run(
                ["git", *settings, *arguments],
                input=given,
                capture_output=True,
                timeout=_SECONDS,
                env=self._environment,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Breach(f"git cannot be asked: {error}") from error
