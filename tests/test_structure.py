"""The shape of the project: floors, documentation, safety."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import adaptax as ax

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "adaptax"

GROUND = {
    "task", "tree", "roles", "losses", "metrics", "io", "text", "process", "protocols", "origins",
    "distributions", "checks", "caches", "processes", "weights",
}  # fmt: skip
PRIMITIVES = {"inner", "svgd", "conv", "rewrite", "batch_norm", "roots", "watch", "program", "look",
              "switch", "conv_forms", "pooling", "modes", "beside",
              "primitive"}  # fmt: skip
ROOMS = {
    "ground": set(),
    "primitives": {"ground"},
    "learner": {"ground", "primitives"},
    "algorithms": {"ground", "primitives", "learner"},
    "models": {"ground", "primitives", "learner"},
    "tasks": {"ground", "primitives", "learner"},
    "engine": {"ground", "primitives", "learner"},
    "testing": {"ground", "primitives", "learner", "engine", "models", "tasks"},
    "rl": {"ground", "primitives", "learner", "engine"},
    "recipes": {"ground", "primitives", "learner", "algorithms", "models", "tasks", "engine", "rl"},
    "sklearn": {
        "ground",
        "primitives",
        "learner",
        "algorithms",
        "models",
        "tasks",
        "engine",
        "recipes",
    },
    "report": {"ground", "primitives", "learner", "engine"},
    "studies": {
        "ground",
        "primitives",
        "learner",
        "algorithms",
        "models",
        "tasks",
        "engine",
        "recipes",
        "report",
    },
    "cli": {"ground", "engine", "recipes", "report", "studies"},
}
"""The arrows: what each room may import, beside itself. `docs/design.md` says the same."""


def room_of(name: str) -> str:
    """The room of a module by its name below the package."""
    first = name.split(".")[0]
    if first in GROUND:
        return "ground"
    if first in PRIMITIVES:
        return "primitives"
    return "cli" if first == "__main__" else first


def modules(top: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules below it."""
    found = {}
    for path in sorted(top.rglob("*.py")):
        parts = path.relative_to(top).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(name: str, files: dict[str, Path]) -> set[str]:
    """The modules that a file imports, at its head or inside functions, but not for types alone."""
    path = files[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]  # fmt: skip
    skipped = {id(node) for branch in for_types for node in ast.walk(branch)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = package[: len(package) - node.level + 1]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in files else ".".join(base))
    return (found & files.keys()) - {name}


def wrong_arrows(files: dict[str, Path]) -> list[str]:
    """Imports that go where no arrow does."""
    return [
        f"{name} imports {other}"
        for name in files
        for other in imports(name, files)
        if room_of(other) not in {room_of(name), *ROOMS[room_of(name)]}
    ]


def circles(files: dict[str, Path]) -> list[list[str]]:
    """Files that import each other, directly or around."""
    graph = {name: imports(name, files) for name in files}
    reach = {name: set(others) for name, others in graph.items()}
    for via in graph:
        for name in graph:
            if via in reach[name]:
                reach[name] |= reach[via]
    return sorted({tuple(sorted(n for n in reach[name] if name in reach[n] and n in reach[name]))
                   for name in graph if name in reach[name]})  # fmt: skip


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p.name != "__init__.py" or p.parent != SOURCE]


def test_imports_follow_the_arrows():
    assert not wrong_arrows(modules(SOURCE))


def test_no_circles_between_files():
    assert not circles(modules(SOURCE))


def test_a_planted_arrow_and_a_planted_circle_are_found(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "engine" / "fit.py").write_text("from ..tasks import sinusoid\n")
    (tmp_path / "tasks" / "sinusoid.py").write_text(
        "from .. import tree\ndef f():\n    from ..engine.fit import fit\n"
    )
    (tmp_path / "tree.py").write_text("")
    planted = modules(tmp_path)
    assert set(wrong_arrows(planted)) == {
        "engine.fit imports tasks.sinusoid",
        "tasks.sinusoid imports engine.fit",
    }
    assert circles(planted) == [("engine.fit", "tasks.sinusoid")]


def documented() -> str:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return "\n".join(page.read_text() for page in pages)


@pytest.mark.parametrize("name", ax.__all__)
def test_public_names_are_documented(name):
    value = getattr(ax, name)
    if not inspect.isclass(value) and not inspect.isroutine(value) and not inspect.ismodule(value):
        pytest.skip("an alias, documented where it is defined")
    assert inspect.getdoc(value), f"{name} has no docstring"
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    public = [m for m in re.findall(r"^::: (\S+)", documented(), re.M)]
    parents = [".".join(module.split(".")[:i]) for i in range(1, len(module.split(".")) + 1)]
    assert any(p in public for p in parents), f"{name} ({module}) is not in docs/reference/"


def test_names_of_rl_take_the_place_of_no_other():
    assert ax.rl.BayesianMAML.__module__ == "adaptax.algorithms.svpg"
    assert ax.BayesianMAML.__module__ == "adaptax.algorithms.bmaml"


def test_nothing_executes_data():
    """No eval, no exec and no pickle anywhere in the package but for one restricted reader.

    LEO's authors released their embeddings as pickles. `embedding_archive` reads them with an
    unpickler that knows no module, and bounds what they build: the one that is written in Python,
    of which every instruction can be replaced.
    """
    reader = SOURCE / "tasks" / "embedding_archive.py"
    for path in FILES:
        forbidden = {"pickle", "dill", "shelve", "marshal"}
        forbidden -= {"pickle"} if path == reader else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(a.name for a in node.names)]
                assert not forbidden & set(names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.Attribute) and path == reader:
                assert node.attr not in {"loads", "Unpickler"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_classes_are_two_deep():
    """Every class of ours derives from an abstract one at most, never from a concrete one."""
    from adaptax import learner, task
    from adaptax.rl.outer import OnRollOuts

    abstract = {learner.Adapter, learner.MetaLearner, learner.InnerLoop, OnRollOuts}
    abstract |= {task.TaskDistribution, task.HostTaskDistribution}
    for module in [getattr(ax, name) for name in ax.__all__]:
        if inspect.ismodule(module) and module.__name__.startswith("adaptax"):
            for cls in vars(module).values():
                if inspect.isclass(cls) and cls.__module__.startswith("adaptax"):
                    ours = [b for b in cls.__bases__ if b.__module__.startswith("adaptax")]
                    assert set(ours) <= abstract or issubclass(cls, Exception), cls
