"""The shape of the project: floors, documentation, safety."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import adaptax as ax

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "adaptax"

# A module imports from its own floor or from those before it.
FLOORS = [
    {"task", "tree", "roles", "program", "rewrite", "roots", "watch", "text", "process"},
    {"losses", "conv", "metrics", "io", "svgd", "augment", "fingerprint"},
    {"inner", "batch_norm"},
    {"learner"},
    {"algorithms", "tasks", "models", "bridge"},
    {"mapping", "feed", "run"},
    {"scoring"},
    {"evaluate", "divergence"},
    {"train", "testing", "rl"},
    {"pretrain"},
    {"recipes", "report", "analysis"},
    {"cli", "__main__"},
]


def floor(room: str) -> int:
    (number,) = (i for i, rooms in enumerate(FLOORS) if room in rooms)
    return number


def imports(path: Path) -> set[str]:
    """The rooms of the package that a file imports."""
    here = ("adaptax", *path.relative_to(SOURCE).with_suffix("").parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("adaptax.")}
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p.name != "__init__.py" or p.parent != SOURCE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_import_goes_up(path):
    here = floor(room_of(path))
    for room in imports(path):
        assert floor(room) <= here, f"{path.name} imports {room}, which is above it"


def documented() -> str:
    return (ROOT / "docs" / "reference.md").read_text()


@pytest.mark.parametrize("name", ax.__all__)
def test_public_names_are_documented(name):
    value = getattr(ax, name)
    if not inspect.isclass(value) and not inspect.isroutine(value) and not inspect.ismodule(value):
        pytest.skip("an alias, documented where it is defined")
    assert inspect.getdoc(value), f"{name} has no docstring"
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    public = [m for m in re.findall(r"^::: (\S+)", documented(), re.M)]
    parents = [".".join(module.split(".")[:i]) for i in range(1, len(module.split(".")) + 1)]
    assert any(p in public for p in parents), f"{name} ({module}) is not in docs/reference.md"


def test_nothing_executes_data():
    """No eval, no exec and no pickle anywhere in the package but for one restricted reader.

    LEO's authors released their embeddings as pickles. `embedding_archive` reads them with an
    unpickler that knows no module, after it has checked what they build.
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
                assert node.attr not in {"loads", "_Unpickler"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_classes_are_two_deep():
    """Every class of ours derives from an abstract one at most, never from a concrete one."""
    from adaptax import learner, task

    abstract = {learner.MetaLearner, task.TaskDistribution, task.HostTaskDistribution}
    for module in list(vars(ax).values()):
        if inspect.ismodule(module) and module.__name__.startswith("adaptax"):
            for cls in vars(module).values():
                if inspect.isclass(cls) and cls.__module__.startswith("adaptax"):
                    ours = [b for b in cls.__bases__ if b.__module__.startswith("adaptax")]
                    assert set(ours) <= abstract or issubclass(cls, Exception), cls
