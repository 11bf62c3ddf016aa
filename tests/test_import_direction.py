"""Imports point left only: the direction of DESIGN.md, read from the source with `ast`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "blocktune"

# What each part may import besides itself; whatever is not named here is not allowed. A dotted
# name is one module of a part: the engine is asked by RagExamples, and needs no more of data.
GROUND = {"registry", "sharded", "layout", "probe", "positions", "attention", "select", "links"}
SPEAKING = GROUND | {"prompt", "fetch", "identity", "dtypes", "devices", "quantize", "adapter"}
SERVING = SPEAKING | {"cache", "reshape", "reuse", "engine"}
ALLOWED = {
    "plugins": set(),
    "registry": {"plugins"},
    "provenance": set(),
    "sharded": set(),
    "layout": set(),
    "probe": {"layout"},
    "positions": {"sharded", "layout", "probe"},
    "attention": {"layout", "positions"},
    "select": {"registry", "layout", "positions"},
    "reshape": {"registry", "layout", "attention"},
    "links": {"sharded", "layout", "positions"},
    "prompt": GROUND,
    "identity": GROUND | {"prompt"},
    "fetch": set(),
    "dtypes": set(),
    "devices": set(),
    "quantize": set(),
    "adapter": GROUND | {"prompt", "fetch", "identity"},
    "data": SPEAKING,
    "training": SPEAKING | {"provenance", "data"},
    "cache": SPEAKING,
    "reuse": SPEAKING | {"cache", "reshape"},
    "engine": SPEAKING | {"cache", "reshape", "reuse", "data.example"},
    "check": SERVING | {"data", "specimen"},
    "evaluation": SERVING | {"provenance", "data"},
    "serve": SERVING | {"data"},
    "merge": SPEAKING | {"engine"},
    "hub": SERVING | {"provenance", "data", "check"},
    "specimen": SERVING,
    "bench": SERVING | {"provenance", "specimen"},
    "commands": SERVING
    | {"data", "training", "evaluation", "serve", "hub", "merge", "check", "bench"},
    "cli": {"commands", "plugins"},
    "__init__": set(),
}
# `blocktune --help` runs these at import; the rest is loaded inside functions.
LIGHT = {"__init__.py", "cli.py", "commands"}
HEAVY = {
    "accelerate",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "trl",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


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
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(path: Path) -> str:
    return ".".join(["blocktune", *path.relative_to(PACKAGE).parent.parts])


def neighbours(path: Path, tree: ast.AST) -> set[str]:
    """What a file imports from blocktune, as ``part.module``, its own part left out."""
    known = {part_of(source) for source in sources()} - {part_of(path)}
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

    return Strip().visit(tree)


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    part = part_of(path)
    assert part in ALLOWED, f"'{part}' has no place in the direction; give it one here"
    wrong = [name for name in neighbours(path, read(path)) if not is_allowed(name, part)]
    assert not wrong, f"{part} must not import {sorted(wrong)}"


def test_the_direction_has_no_cycle_and_keeps_training_from_serving():
    def reach(part, seen=()):
        assert part not in seen, f"cycle: {(*seen, part)}"
        parts = ALLOWED.get(part, set())
        return parts.union(*(reach(p, (*seen, part)) for p in parts))

    for part in ALLOWED:
        reach(part)
    serving = {"cache", "reuse", "engine"}
    assert not reach("training") & serving
    assert not any("training" in reach(part) for part in serving)


@pytest.mark.parametrize("path", [p for p in sources() if p.relative_to(PACKAGE).parts[0] in LIGHT])
def test_the_command_line_imports_nothing_heavy(path):
    names = imported(at_import(read(path)), package_of(path))
    assert not {name.split(".")[0] for name in names} & HEAVY


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_importing_registers_nothing_with_transformers_or_torch(path):
    calls = [
        ast.unparse(n.func) for n in ast.walk(at_import(read(path))) if isinstance(n, ast.Call)
    ]
    foreign = (
        "AttentionInterface",
        "AttentionMaskInterface",
        "AutoModel",
        "AutoConfig",
        "torch.set",
    )
    assert not [call for call in calls if call.startswith(foreign)]


@pytest.mark.parametrize(
    ("package", "line", "expected"),
    [
        ("blocktune.training", "from blocktune.engine import Engine", {"blocktune.engine.Engine"}),
        ("blocktune.training", "from ..reuse import build", {"blocktune.reuse.build"}),
        ("blocktune.reuse.select", "from ... import engine", {"blocktune.engine"}),
        ("blocktune", "from .layout import Layout", {"blocktune.layout.Layout"}),
        ("blocktune", "import torch.nn as nn", {"torch.nn"}),
        ("blocktune", "def f():\n    from blocktune import cache", {"blocktune.cache"}),
    ],
)
def test_the_reader_sees_every_form_of_import(package, line, expected):
    assert imported(ast.parse(line), package) == expected
