"""Imports point left only, and no files import each other in a circle: read with `ast`."""

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "blocktune"

# What each part may import besides itself; whatever is not named here is not allowed. A dotted
# name is one module of a part: training uses the pure selectors and no more of methods.
TOOLS = {"lazy", "registry", "parsing", "files", "tables", "provenance", "plugins", "memory"}
GROUND = TOOLS | {"models", "layout", "positions", "attention", "links"}
PROMPT = GROUND | {"prompt", "adapter"}
SERVING = PROMPT | {"cache", "methods", "engine"}
ALLOWED = {
    "__init__": {"lazy"},
    "lazy": set(),
    "plugins": set(),
    "parsing": set(),
    "files": set(),
    "memory": set(),
    "tables": set(),
    "registry": {"plugins", "parsing"},
    "provenance": {"files"},
    "models": TOOLS | {"layout", "positions", "attention"},
    "layout": set(),
    "positions": {"lazy"},
    "attention": {"layout", "lazy", "registry"},
    "links": TOOLS | {"models", "layout", "positions"},
    "prompt": GROUND,
    "adapter": GROUND | {"prompt"},
    "data": PROMPT,
    "training": PROMPT | {"data", "methods.select"},
    "cache": PROMPT,
    "methods": PROMPT | {"cache"},
    "extras": PROMPT | {"cache", "methods"},  # plug-ins: they see no engine, and nobody names them
    "engine": PROMPT | {"cache", "methods", "data.example"},
    "testing": SERVING,
    "check": SERVING | {"testing"},
    "evaluation": SERVING | {"data"},
    "hub": SERVING | {"data", "check"},
    "bench": SERVING | {"testing", "vllm", "evaluation.report.style"},  # how pictures look
    "server": SERVING | {"data", "check"},
    "vllm": SERVING | {"data", "server"},
    "commands": SERVING
    | {"data", "training", "evaluation", "hub", "check", "bench", "server", "vllm"},
    "cli": {"commands", "plugins"},
}
# `blocktune --help` runs these at import; the rest is loaded inside functions.
LIGHT = {"__init__.py", "cli.py", "commands"}
HEAVY = {
    "accelerate",
    "datasets",
    "deepspeed",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "peft",
    "prometheus_client",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
    "trl",
    "uvicorn",
    "vllm",
}


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


SOURCES = {path: read(path) for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: str) -> set[str]:
    """The dotted names that a tree imports, the relative ones resolved against `package`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {home_of(f"{base}.{alias.name}") for alias in node.names}
    return names


LAZY = (
    *("adapter", "attention", "cache", "data", "engine", "positions", "prompt"),
    *("methods", "methods.select", "server", "vllm"),
)


@functools.cache
def lazy_homes() -> dict[str, str]:
    """Where every public name that a package imports on first use is defined."""
    homes = {}
    for part in LAZY:
        package = importlib.import_module(f"blocktune.{part}")
        names = inspect.getclosurevars(package.__getattr__).nonlocals["home_of"]
        homes |= {f"{package.__name__}.{name}": ".".join(home) for name, home in names.items()}
    return homes


def home_of(name: str) -> str:
    """A dotted name in the module that defines it."""
    while name in lazy_homes():
        name = lazy_homes()[name]
    return name


def package_of(path: Path) -> str:
    return ".".join(["blocktune", *path.relative_to(PACKAGE).parent.parts])


def neighbours(path: Path, tree: ast.AST) -> set[str]:
    """What a file imports from blocktune, as ``part.module``, its own part left out."""
    known = {part_of(source) for source in SOURCES} - {part_of(path)}
    names = (name.partition(".") for name in imported(tree, package_of(path)))
    inner = {rest for top, _, rest in names if top == "blocktune"}
    return {name for name in inner if name.split(".")[0] in known}


def is_allowed(name: str, part: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in ALLOWED[part])


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that importing the file executes: no function bodies, no type checking."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    return Strip().visit(ast.parse(ast.unparse(tree)))


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each name that can reach itself, each circle once."""
    found = set()
    for start in edges:
        came = {start: None}
        queue = [start]
        while queue:
            here = queue.pop(0)
            for there in sorted(edges.get(here, ())):
                if there == start:
                    circle = [here]
                    while came[circle[-1]] is not None:
                        circle.append(came[circle[-1]])
                    found.add(tuple(sorted(circle)))
                elif there not in came:
                    came[there] = here
                    queue.append(there)
    return sorted(map(list, found))


def test_imports_point_left():
    wrong = []
    for path, tree in SOURCES.items():
        part = part_of(path)
        if part not in ALLOWED:
            wrong.append(f"'{part}' has no place in the direction; give it one here")
            continue
        bad = sorted(name for name in neighbours(path, tree) if not is_allowed(name, part))
        wrong += [f"{path.relative_to(PACKAGE)} must not import {name}" for name in bad]
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    edges = {}
    for name, path in MODULES.items():
        named = imported(SOURCES[path], package_of(path))
        targets = {n if n in MODULES else n.rpartition(".")[0] for n in named}
        edges[name] = {target for target in targets & MODULES.keys() if target != name}
    assert not cycles(edges)
    one = next(name for name in edges if edges[name] and not name.endswith("blocktune"))
    edges[min(edges[one])].add(one)
    assert cycles(edges), "a circle must be found"


def test_the_direction_has_no_circle_and_keeps_training_from_serving():
    parts = {part: {name.split(".")[0] for name in allowed} for part, allowed in ALLOWED.items()}
    parts["engine"].discard("data")  # data.example alone, which imports no engine
    parts["training"].discard("methods")  # pure selectors alone
    assert not cycles(parts)
    serving = {"cache", "engine"}
    assert not parts["training"] & serving
    assert not any("training" in parts[part] for part in serving)


def test_no_part_names_an_extra():
    words = {"cache_craft", "semsharekv", "cache-craft", "SemShareKV"}
    for path in SOURCES:
        if part_of(path) in {"engine", "cache", "methods", "plugins", "registry"}:
            assert not [word for word in words if word in path.read_text(encoding="utf-8")], path


def test_training_loads_no_reuse_method():
    reached, queue = set(), [name for name in MODULES if name.startswith("blocktune.training")]
    while queue:
        name = queue.pop()
        if name in reached or name not in MODULES:
            continue
        reached.add(name)
        path = MODULES[name]
        named = imported(at_import(SOURCES[path]), package_of(path))
        queue += [n if n in MODULES else n.rpartition(".")[0] for n in named]
    assert "blocktune.methods.select.base" in reached
    assert not [name for name in reached if name.startswith("blocktune.methods.presets")]
    assert not reached & {"blocktune.methods.base", "blocktune.engine", "blocktune.cache"}


def test_the_command_line_imports_nothing_heavy():
    for path, tree in SOURCES.items():
        if path.relative_to(PACKAGE).parts[0] in LIGHT:
            names = imported(at_import(tree), package_of(path))
            assert not {name.split(".")[0] for name in names} & HEAVY, path


@pytest.mark.parametrize(
    "part",
    [
        *("adapter", "data", "methods", "methods.select"),
        *("positions", "prompt"),
    ],
)
def test_every_lazy_name_is_there_and_hidden_by_no_module(part):
    package = importlib.import_module(f"blocktune.{part}")
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name not in modules
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = package.nothing_of_that_name


def test_importing_registers_nothing_with_transformers_or_torch():
    foreign = (
        "AttentionInterface",
        "AttentionMaskInterface",
        "AutoModel",
        "AutoConfig",
        "torch.set",
    )
    for path, tree in SOURCES.items():
        calls = [ast.unparse(n.func) for n in ast.walk(at_import(tree)) if isinstance(n, ast.Call)]
        assert not [call for call in calls if call.startswith(foreign)], path


def test_the_reader_sees_every_form_of_import():
    forms = [
        (
            "blocktune.training",
            "from blocktune.adapter import Release",
            {"blocktune.adapter.releases.Release"},
        ),
        ("blocktune.training", "from ..adapter import scope", {"blocktune.adapter.scope"}),
        ("blocktune", "from .methods import FirstK", {"blocktune.methods.select.tokens.FirstK"}),
        ("blocktune.methods.select", "from ... import engine", {"blocktune.engine"}),
        ("blocktune", "from .layout import Layout", {"blocktune.layout.Layout"}),
        ("blocktune", "import torch.nn as nn", {"torch.nn"}),
        ("blocktune", "def f():\n    from blocktune import cache", {"blocktune.cache"}),
    ]
    for package, line, expected in forms:
        assert imported(ast.parse(line), package) == expected
