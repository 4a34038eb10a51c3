"""The import closure: nothing that runs is missing, nothing that cannot run is in it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradnoise.base.closure import code_closure
from gradnoise.base.errors import InputError

SOURCE = Path(__file__).parents[3] / "src"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in (SOURCE / "gradnoise").rglob("*.py")
)

# Imports every module named on the command line afresh and says which modules of the package came with it.
LOADED = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1:]:
    for old in [m for m in sys.modules if m.partition(".")[0] == "gradnoise"]:
        del sys.modules[old]
    importlib.import_module(name)
    loaded[name] = sorted(m for m in sys.modules if m.partition(".")[0] == "gradnoise")
print(json.dumps(loaded))
"""


def package(root: Path, **files: str) -> Path:
    """A source folder with `gradnoise/` made of the given files; `a__b` is `a/b.py`, `a__` is a package."""
    base = root / "src" / "gradnoise"
    base.mkdir(parents=True)
    for name, text in {"": "", **files}.items():
        path = base.joinpath(*name.split("__"))
        path = path / "__init__.py" if name.endswith("__") or not name else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "src"


def names(source: Path, module: str) -> set[str]:
    return {path.removeprefix("src/gradnoise/") for path in code_closure(module, source)}


def test_every_module_that_an_import_loads_is_in_the_closure() -> None:
    command = [sys.executable, "-c", LOADED, *MODULES]
    loaded = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    for module, companions in loaded.items():
        closure = set(code_closure(module, SOURCE))
        for companion in companions:
            stem = "src/" + companion.replace(".", "/")
            assert {f"{stem}.py", f"{stem}/__init__.py"} & closure, f"{module} loads {companion}"


def test_no_module_hides_an_import_in_a_string() -> None:
    """The closure cannot follow a module name that is computed; only the lazy table of a package may."""
    for path in (SOURCE / "gradnoise").rglob("*.py"):
        if path.name != "__init__.py":
            words = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(ast.parse(path.read_bytes()))}
            assert not {"import_module", "__import__"} & words, f"{path}: import it by a statement"


def test_imports_are_followed_wherever_they_run(tmp_path: Path) -> None:
    source = package(
        tmp_path,
        phase="def run():\n    if True:\n        from gradnoise.a import deep\n",
        a__="",
        a__deep="from . import near\nfrom .. import far\nfrom ..b.name import value\nimport torch, os",
        a__near="",
        far="import gradnoise.c.d as other",
        b__="",
        b__name="value = 1",
        c__="",
        c__d="",
        c__unused="",
    )
    assert names(source, "gradnoise.phase") == {
        *("__init__.py", "phase.py", "far.py"),
        *("a/__init__.py", "a/deep.py", "a/near.py", "b/__init__.py", "b/name.py"),
        *("c/__init__.py", "c/d.py"),
    }


def test_packages_on_the_way_run_and_so_does_what_they_import(tmp_path: Path) -> None:
    source = package(tmp_path, phase="import gradnoise.a.b.c", a__="from gradnoise import top", top="")
    for name in ("a/b/__init__.py", "a/b/c.py"):
        path = source / "gradnoise" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    closure = {"__init__.py", "phase.py", "a/__init__.py", "a/b/__init__.py", "a/b/c.py", "top.py"}
    assert names(source, "gradnoise.phase") == closure


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_an_import_for_type_checkers_alone_is_left_out(tmp_path: Path, test: str) -> None:
    text = f"if {test}:\n    from gradnoise import hint\nelse:\n    from gradnoise import real\n"
    source = package(tmp_path, phase=text, hint="", real="")
    assert names(source, "gradnoise.phase") == {"__init__.py", "phase.py", "real.py"}


def test_a_lazy_name_counts_only_where_it_is_imported(tmp_path: Path) -> None:
    source = package(
        tmp_path,
        user="from gradnoise import meter",
        stranger="from gradnoise import other",
        home="def meter(): pass",
        other="",
    )
    (source / "gradnoise" / "__init__.py").write_text('_HOMES = {"meter": "gradnoise.home"}\n')
    assert names(source, "gradnoise.user") == {"__init__.py", "user.py", "home.py"}
    assert names(source, "gradnoise.stranger") == {"__init__.py", "stranger.py", "other.py"}


def test_the_public_names_of_the_package_lead_to_their_homes(tmp_path: Path) -> None:
    """The real lazy table is read."""
    source = package(tmp_path, user="from gradnoise import exposure", noise__="", noise__exposure="")
    (source / "gradnoise" / "__init__.py").write_bytes((SOURCE / "gradnoise" / "__init__.py").read_bytes())
    assert "noise/exposure.py" in names(source, "gradnoise.user")


def test_templates_beside_the_code_are_code(tmp_path: Path) -> None:
    source = package(tmp_path, report__="", report__render="", phase="import gradnoise.report.render")
    for name in ("report.html.j2", "py.typed", ".report.html.j2.swp", "render.pyc"):
        (source / "gradnoise" / "report" / name).touch()
    closure = {"__init__.py", "phase.py", "report/__init__.py", "report/render.py", "report/report.html.j2"}
    assert names(source, "gradnoise.phase") == closure


def test_an_edited_import_is_seen_in_the_same_process(tmp_path: Path) -> None:
    source = package(tmp_path, phase="", late="")
    assert "late.py" not in names(source, "gradnoise.phase")
    (source / "gradnoise" / "phase.py").write_text("from gradnoise import late")
    assert "late.py" in names(source, "gradnoise.phase")


def test_an_unknown_module_is_refused(tmp_path: Path) -> None:
    source = package(tmp_path)
    for module in ("gradnoise.missing", "json"):
        with pytest.raises(InputError, match=f"^module: {module}: must be a module under"):
            code_closure(module, source)
