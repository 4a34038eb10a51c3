"""The bare package: torch and numpy are enough for the library; the lock pins everything else."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.workflow.project import ROOT

import gradnoise

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# One public name after the other, then a reading of a model's noise.
USE = """
import importlib.util, json, sys
import torch
import gradnoise

public = {name: repr(getattr(gradnoise, name)) for name in gradnoise.__all__}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
meter = gradnoise.exposure(model, optimizer, every=1)
for _ in range(3):
    for _ in range(4):
        x = torch.randn(16, 4)
        (model(x).pow(2).mean() / 4).backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({
    "file": gradnoise.__file__,
    "public": list(public),
    "trace": float(meter.last.trace),
    "others": [name for name in ("pandas", "pydantic", "pyarrow", "typer") if importlib.util.find_spec(name)],
}))
"""


def needed_by(names: list[str]) -> set[str]:
    """The distributions that these need, directly or not, as installed here."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for line in importlib.metadata.requires(name) or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(canonicalize_name(requirement.name))
    return found


def link_files(distribution: str, folder: Path) -> None:
    """Link every installed file of a distribution into another site-packages folder."""
    for file in importlib.metadata.files(distribution) or []:
        if ".." in file.parts:
            continue  # programs
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(Path(str(file.locate())).resolve())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy of its sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--wheel-dir", str(built), str(source)], check=True)
    (file,) = built.glob("*.whl")
    return file


def test_the_wheel_needs_torch_and_numpy_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
        packed = {name for name in archive.namelist() if name.startswith("gradnoise/")}
    requirements = [Requirement(line) for line in lines]
    assert {r.name for r in requirements if r.marker is None} == {"torch", "numpy"}
    sources = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/gradnoise").rglob("*") if path.is_file()
    }
    assert packed == {path for path in sources if "__pycache__" not in path}


@pytest.mark.slow
def test_the_library_works_where_only_torch_and_numpy_are_installed(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env/bin/python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    for distribution in needed_by(["torch", "numpy"]):
        link_files(distribution, folder)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    # -I: neither the working folder nor PYTHONPATH can lend it a package.
    done = subprocess.run([str(python), "-I", "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert Path(answer["file"]).is_relative_to(folder)
    assert answer["public"] == list(gradnoise.__all__)
    assert answer["trace"] > 0
    assert answer["others"] == []


def locked() -> dict[str, tuple[str, int]]:
    """Version and number of hashes of every entry of the lock."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    entries = [entry for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ")) if entry.strip()]
    parsed = {}
    for entry in entries:
        match = re.match(
            r"([\w.\-]+)==([\w.+!\-]+)( ;[^\\]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})*)\s*$", entry
        )
        assert match, f"not a pinned entry: {entry[:100]}"
        parsed[canonicalize_name(match[1])] = (match[2], match[4].count("--hash"))
    return parsed


def test_the_lock_pins_every_requirement_with_hashes() -> None:
    lock = locked()
    assert [name for name, (_, hashes) in lock.items() if not hashes] == []
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for line in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "torch":  # installed first and apart
            assert "torch" not in lock
            continue
        assert name in lock, f"{line} is not in requirements.lock"
        assert lock[name][0] in requirement.specifier, (
            f"requirements.lock has {name} {lock[name][0]}, not {line}"
        )


def test_torch_has_one_version_everywhere() -> None:
    (pinned,) = (line for line in PROJECT["optional-dependencies"]["study"] if line.startswith("torch"))
    for file in ("Makefile", "requirements.lock", "workflow/envs/gradnoise.post-deploy.sh"):
        assert set(re.findall(r"(?<![\w-])torch==[\d.]+", (ROOT / file).read_text())) == {pinned}, file


def test_the_lock_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"(?:https?://|--(?:extra-)?index|--find-links|--trusted-host)\S*", text) == []
