"""The plan decides: no code that carries it out holds a margin, level, number of draws or target itself."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

# Code that carries out a plan, and code that checks it. Figures only draw, so in them numbers are lengths and
# shades, unless something is compared with them or computed by the analysis from them.
CARRIED_OUT = ("src/gradnoise/analysis", "src/gradnoise/provenance/audit")
DRAWN = ("src/gradnoise/figures",)

# Where the functions are called that have defaults for what a plan decides, and what that is.
CALLERS = ("analyse", "beside", "decisions", "verdicts")
DECIDED = {"alpha", "alternative", "draws", "high", "level", "low", "margin", "missing_p", "seed", "trials"}

# A default that decides nothing where it is used, with its reason.
HARMLESS_DEFAULTS = {("beside", "seed_slopes.alternative"): "only the slopes are taken"}

# Keywords that tell a solver when to stop.
SOLVER = {"limit", "maxiter"}
# Numbers that no plan could decide, by file, with their reasons. An entry that is not used is a fault.
KNOWN = {
    ("kenward_roger.py", 0.01): "nearer than this the formula of the scale is 0 / 0",
    ("reml_search.py", 0.1): "where a search starts",
    ("dense_mixed.py", 0.3): "where a search starts",
    ("evidence.py", 193): "bits that leave 63",
    ("findings.py", 300): "characters of a line of evidence",
    ("trends.py", 0.9): "level of an interval that is not reported",
}


def deciding_literals(source: str) -> list[tuple[int, float]]:
    """(line, value) of every number that may be a threshold: in (.001, 1) but a half, or whole from 100 on.

    Not counted: a constant of the module, named in capitals and explained by a comment, and the default of a
    keyword of a public function, which whoever carries out a plan must give.
    """
    tree = ast.parse(source)
    exempt = {id(node) for part in _exempt(tree, source.splitlines()) for node in ast.walk(part)}
    return [(node.lineno, node.value) for node in ast.walk(tree) if id(node) not in exempt and _decides(node)]


def _decides(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, float):
        return 1e-3 < value < 1 and value != 0.5
    return type(value) is int and value >= 100


def _exempt(tree: ast.Module, lines: list[str]) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from (default for default in (*node.args.defaults, *node.args.kw_defaults) if default)
        if isinstance(node, ast.keyword) and node.arg in SOLVER:
            yield node
    for node in tree.body:
        if isinstance(node, ast.Assign) and _explained(node.lineno, lines):
            names = {
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
            if all(name.isupper() for name in names):
                yield node


def _explained(line: int, lines: list[str]) -> bool:
    """Whether a comment stands above the line or in it."""
    return lines[line - 2].startswith("#") or "#" in lines[line - 1]


def compared_literals(source: str) -> list[tuple[int, float]]:
    """The same of a module that draws: in comparisons, and in calls of what it imports from the analysis."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradnoise.analysis")
        for alias in node.names
    }
    inside = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported)
    ]
    return [(n.lineno, n.value) for part in inside for n in ast.walk(part) if _decides(n)]


def ungiven(source: str, functions: dict[str, object]) -> list[tuple[int, str]]:
    """(line, function.parameter) of every call that leaves to a default what a plan decides."""
    missing = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        function = functions.get(node.func.id)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
        given = {*list(parameters)[: len(node.args)], *(keyword.arg for keyword in node.keywords)}
        missing += [
            (node.lineno, f"{node.func.id}.{name}")
            for name, parameter in parameters.items()
            if name in DECIDED and parameter.default is not parameter.empty and name not in given
        ]
    return missing


def files(folders: tuple[str, ...]) -> list[Path]:
    found = sorted(path for name in folders for path in Path(name).rglob("*.py"))
    assert found
    return found


def test_no_threshold_is_written_in_code_that_carries_out_or_checks_a_plan() -> None:
    found = {
        (path.name, value): line
        for path in files(CARRIED_OUT)
        for line, value in deciding_literals(path.read_text(encoding="utf-8"))
    }
    assert found.keys() - KNOWN.keys() == set(), (
        "let the plan say it, or name and explain a numerical constant"
    )
    assert KNOWN.keys() - found.keys() == set(), "is no exception any more"


@pytest.mark.parametrize("path", files(DRAWN), ids=lambda path: path.name)
def test_no_figure_compares_with_a_number_of_its_own(path: Path) -> None:
    assert compared_literals(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", CALLERS)
def test_nothing_that_a_plan_decides_is_left_to_a_default(name: str) -> None:
    module = import_module(f"gradnoise.analysis.{name}")
    functions = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__.startswith("gradnoise.analysis")
    }
    found = {parameter for _, parameter in ungiven(inspect.getsource(module), functions)}
    assert found == {parameter for caller, parameter in HARMLESS_DEFAULTS if caller == name}


PLANTED = {
    "an alpha": "def run(p):\n    return p <= 0.05\n",
    "a level of its own": "def run(x):\n    return interval(x, level=0.95)\n",
    "a margin below zero": "def run(x):\n    return tost(x, low=-0.02, high=0.02)\n",
    "draws": "def run(x):\n    return trend(x, draws=9_999)\n",
    "a constant without a word": "_ALPHA = 0.05\n",
    "a constant in small letters": "# Two words.\nalpha = 0.05\n",
    "a constant in a function": "def run(p):\n    # Of the field.\n    ALPHA = 0.05\n    return p <= ALPHA\n",
    "a default of a private function": "def _run(p, alpha=0.05):\n    return p <= alpha\n",
    "a target in a table": "TARGETS = {'race': 0.05}\n",
}
HARMLESS = {
    "an explained constant": "# Rounding alone.\n_AGREEMENT = 0.01\n",
    "a constant with a word": "_BLOCK = 2000  # rows at a time\n",
    "a default of a public function": "def run(p, *, alpha=0.05):\n    return p <= alpha\n",
    "rounding": "def run(x):\n    return abs(x) < 1e-9\n",
    "half of it": "def run(x):\n    return 0.5 * x\n",
    "a few": "def run(x):\n    return x[:3]\n",
    "a truth value": "def run(x):\n    return x is True\n",
    "a solver's patience": "def run(x):\n    return fit(x, maxiter=500)\n",
}


def test_the_lint_finds_every_planted_number_and_no_harmless_one() -> None:
    assert [name for name, source in PLANTED.items() if not deciding_literals(source)] == []
    assert [name for name, source in HARMLESS.items() if deciding_literals(source)] == []
    drawn = "from gradnoise.analysis.statistics.slopes import seed_slopes\n"
    assert compared_literals("star = '*' if p < 0.05 else ''\n")
    assert compared_literals(drawn + "line = seed_slopes(frame, level=0.9)\n")
    assert not compared_literals(drawn + "axes.plot(x, y, alpha=0.9)\n")


def test_the_lint_finds_a_default_that_was_relied_on() -> None:
    def tost(frame: object, *, low: float, high: float, alpha: float = 0.05) -> None: ...

    functions: dict[str, object] = {"tost": tost}
    assert ungiven("tost(f, low=a, high=b, alpha=c)\n", functions) == []
    assert ungiven("x = 1\ntost(f, low=a, high=b)\n", functions) == [(2, "tost.alpha")]
