"""The house rules that a machine can check: layers of imports, public names, docs derived from declarations."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Annotated, Any

import pytest

import stockpot
from stockpot.methods import PerModel, Rank, Real, Space, method, methods

SOURCE = Path(stockpot.__file__).parent

#: a package may import those on lower levels; packages of one level do not import each other
LEVELS = [
    {"errors", "version", "installed"},
    {"specs", "files", "machine", "faster"},
    {"grid"},
    {"statistics"},
    {"checkpoints", "methods", "recipes"},
    {"adapters", "runs"},
    {"planning"},
    {"engine"},
    {"lineage", "doctor", "diagnosis"},
    {"training", "evaluation"},
    {"search"},
    {"reports"},
    {"api"},
    {"cli", "testing"},
]
#: the one exception: a method that is called on dicts runs the engine, which it imports when called
ALLOWED = {("methods", "engine")}


def level(package: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if package in names)


def imports(path: Path) -> set[tuple[str, bool]]:
    """(stockpot package, whether at module level) for each import of a file, in whatever form; "" is the root package."""
    return imports_of(path.read_text(), path.relative_to(SOURCE).parts)


def imports_of(text: str, place: tuple[str, ...]) -> set[tuple[str, bool]]:
    tree = ast.parse(text)
    top = set(map(id, tree.body))
    packages = {name for names in LEVELS for name in names}
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["stockpot", *place[:-1]][: len(place) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # what is taken from the root may be a package of it
            names = [f"{module}.{a.name}" for a in node.names] if module == "stockpot" else [module]
        for parts in (name.split(".") for name in names):
            if parts[0] == "stockpot":
                package = parts[1] if len(parts) > 1 and parts[1] in packages else ""
                found.add((package, id(node) in top))
    return found


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("from stockpot.engine.run import run_plan", "engine"),
        ("from stockpot import engine", "engine"),
        ("import stockpot.engine.run", "engine"),
        ("import stockpot.engine as e", "engine"),
        ("from stockpot import Options", ""),
        ("import stockpot", ""),
        ("from ..engine import run", "engine"),
        ("from .. import engine", "engine"),
        ("def f():\n    from stockpot import cli", "cli"),
    ],
)
def test_every_form_of_import_is_seen(line: str, package: str) -> None:
    assert {name for name, _ in imports_of(line, ("recipes", "nodes.py"))} == {package}


def files() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if (p.name not in ("__main__.py",) and p.parent != SOURCE) or p.stem in
                  {n for names in LEVELS for n in names})  # fmt: skip


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_downward(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for package, at_top in imports(path):
        if package == own or (not at_top and (own, package) in ALLOWED):
            continue
        if package == "":  # the root offers everything: only those above all of it, or for its version
            assert level(own) >= level("api") or (own, "") in ALLOWED, f"{own} imports the root package"
            continue
        assert level(package) < level(own), f"{own} imports {package}"


def modules() -> list[str]:
    return [m.name for m in pkgutil.walk_packages([str(SOURCE)], "stockpot.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_public_names(name: str) -> None:
    try:
        module = importlib.import_module(name)
        missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("stockpot") or importlib.util.find_spec("torch"):
            raise
        pytest.skip(f"{e.name} is not installed")
    assert module.__doc__, f"{name} has no docstring"
    assert not missing, f"{name}.__all__ names {missing}"


def test_top_level_names() -> None:
    for name in stockpot.__all__:
        assert getattr(stockpot, name) is not None
    assert set(dir(stockpot)) == set(stockpot.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        stockpot.nothing  # noqa: B018
    for command in ("merge", "plan", "inspect", "verify", "soup", "evaluate", "sweep", "gate", "path", "report"):
        assert callable(getattr(stockpot, command)), f"a command that Python does not have: {command}"
    assert set(stockpot.__all__) == {*stockpot.api.__all__, "__version__"}
    for name in stockpot.api.__all__:
        assert getattr(stockpot.api, name) is getattr(stockpot, name)


def test_methods_are_described() -> None:
    for found in methods().values():
        if not found.function.__module__.startswith("stockpot."):
            continue
        doc = found.function.__doc__ or ""
        assert found.summary.endswith(".")
        for p in found.parameters.values():
            assert p.name in doc, f"{found.name}: {p.name} is not in its docstring"


def test_declarations_check_themselves() -> None:
    with pytest.raises(TypeError, match="undeclared"):

        @method(space=Space.WEIGHT)
        def takes_more(models: Any, *, surprise: Any) -> Any:
            """."""

    with pytest.raises(TypeError, match="no parameter"):

        @method(space=Space.DELTA, stats=(Rank("density"),))
        def no_density(delta: Any, *, cutoff: Any) -> Any:
            """."""

    with pytest.raises(TypeError, match="exists already"):

        @method(space=Space.WEIGHT)
        def linear(models: Any, *, weight: Annotated[PerModel, Real()] = 1.0) -> Any:
            """."""


def test_methods_page_is_up_to_date() -> None:
    """docs/methods.md has a section for each method, generated from the declarations."""
    root = SOURCE.parents[1]
    if not (root / "docs/methods_page.py").exists():
        pytest.skip("not a source checkout")
    import runpy

    page = runpy.run_path(str(root / "docs/methods_page.py"))["render"]()
    assert (root / "docs/methods.md").read_text() == page, "run: python docs/methods_page.py"


def test_what_make_quick_runs_is_there() -> None:
    """A test file that was renamed must be renamed there too."""
    makefile = Path(__file__).parents[1] / "Makefile"
    if not makefile.exists():
        pytest.skip("not a source checkout")
    (line,) = [row for row in makefile.read_text().splitlines() if row.startswith("QUICK :=")]
    names = line.partition(":=")[2].split()
    assert names
    assert [n for n in names if not (Path(__file__).parent / f"{n}.py").exists()] == []
