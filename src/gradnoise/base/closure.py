"""The code behind a module: its import closure inside the package, read from the source.

Every rule declares these files as inputs, because Snakemake cannot see what a command imports. The source is
parsed, never imported, so that a Snakefile can ask in milliseconds and nothing heavy is loaded.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import gradnoise
from gradnoise.base.errors import InputError
from gradnoise.base.files import sha256, sha256_of


def code_closure(module: str, source: Path | str = "src") -> list[str]:
    """Files whose edit may change what `module` does, sorted, as `src/gradnoise/...`.

    They are the module, every module of the package that it imports, directly or not, at the top or inside
    a function; the `__init__` of every package on the way, which runs on import; and the data files beside
    the modules of those packages (templates). Imports under `if TYPE_CHECKING:` never run and are left out.

    `source` is the folder that holds `gradnoise/`; the paths are the same whatever it is called. Raises
    `InputError` for a module that does not exist.
    """
    source = Path(source)
    if _file(source, module) is None:
        raise InputError("module", module, f"must be a module under {source}/, run from the repository root")
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file(source, name)
        if file is not None and name not in files:
            files[name] = file
            waiting += _imported(source, name, file)
    data = [path for file in files.values() if file.name == "__init__.py" for path in _data(file.parent)]
    return sorted({f"src/{path.relative_to(source).as_posix()}" for path in [*files.values(), *data]})


def closure_hashes(module: str) -> dict[str, str]:
    """SHA-256 of each file of the closure as it runs: of the package that is imported, wherever it lies."""
    source = Path(gradnoise.__file__).parents[1]
    return {path: sha256(source / path.removeprefix("src/")) for path in code_closure(module, source)}


def closure_sha256(module: str) -> str:
    """One SHA-256 for the whole closure as it runs: of the canonical JSON of `closure_hashes`."""
    return sha256_of(closure_hashes(module))


def _file(source: Path, module: str) -> Path | None:
    """The file of a module of the package; None for anything else."""
    if module.partition(".")[0] != "gradnoise":
        return None
    stem = source.joinpath(*module.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def _data(package: Path) -> Iterator[Path]:
    """Files beside a package's modules that its code may read."""
    for path in package.iterdir():
        code = path.suffix in (".py", ".pyc") or path.name == "py.typed"
        if path.is_file() and not code and not path.name.startswith("."):
            yield path


def _imported(source: Path, module: str, file: Path) -> Iterator[str]:
    """Names that may be modules which importing or running `module` imports."""
    parent = module.rpartition(".")[0]
    yield parent
    package = module if file.name == "__init__.py" else parent
    for base, names in _parse(file, file.stat().st_mtime_ns).imports:
        base = resolve_name(base, package)
        yield base
        home = _file(source, base)
        lazy = _parse(home, home.stat().st_mtime_ns).homes if home else {}
        for name in names:
            yield f"{base}.{name}"
            # `from gradnoise import exposure` has the package load the name's home. The table as a whole is
            # no import: a name that nobody asks for is never loaded.
            yield lazy.get(name, "")


class _Imports(ast.NodeVisitor):
    """Imports that run, as (module, names) with dots for relative ones; and the table of lazy names."""

    def __init__(self) -> None:
        self.imports: list[tuple[str, list[str]]] = []
        self.homes: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        self.imports += [(alias.name, []) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.imports.append(("." * node.level + (node.module or ""), [alias.name for alias in node.names]))

    def visit_If(self, node: ast.If) -> None:
        test = getattr(node.test, "attr", None) or getattr(node.test, "id", None)
        for statement in node.orelse if test == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id == "_HOMES" for target in node.targets):
            self.homes = ast.literal_eval(node.value)


@cache
def _parse(file: Path, modified: int) -> _Imports:
    """What a file imports; `modified` is part of the key, so an edit is parsed anew."""
    found = _Imports()
    found.visit(ast.parse(file.read_bytes(), filename=str(file)))
    return found
