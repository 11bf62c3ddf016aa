"""The public interface, as a user's code depends on it: names, signatures, fields.

python tests/downstream/test_api.py    # writes api.txt again: a deliberate change for users
"""

import inspect
from enum import Enum
from pathlib import Path
from types import ModuleType

from transformers import TrainingArguments

import blocktune
import blocktune.methods

RECORD = Path(__file__).with_name("api.txt")
HEADER = """\
# The public interface of blocktune: what user code and plug-ins depend on.
# Written by `python tests/downstream/test_api.py`. A changed line is a change for users.
"""


PLUG_IN_BASES = (blocktune.methods.Method, blocktune.methods.Selection, blocktune.methods.Reshape)


class Bare(str):
    """An annotation, written without quotes."""

    __repr__ = str.__str__


def signature(function) -> str:
    """Its parameters; annotations as they are in the source."""
    found = inspect.signature(function)
    bare = [
        p if p.annotation is p.empty else p.replace(annotation=written(p.annotation))
        for p in found.parameters.values()
    ]
    result = found.return_annotation
    result = result if result is found.empty else written(result)
    return str(found.replace(parameters=bare, return_annotation=result))


def written(annotation) -> Bare:
    annotation = getattr(annotation, "__forward_arg__", annotation)
    return Bare(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def describe(name: str, value) -> list[str]:
    """The lines of one public name."""
    if isinstance(value, ModuleType):
        return []
    if not inspect.isclass(value):
        called = signature(value) if inspect.isroutine(value) else f": {type(value).__name__}"
        return [f"{name}{called}"]
    if issubclass(value, Enum):
        return [f"class {name}: {', '.join(member.name for member in value)}"]
    own = [base for base in value.__mro__ if base.__module__.startswith("blocktune")]
    if issubclass(value, TrainingArguments):  # TRL's own options are TRL's
        lines = [f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"]
        for base in own:
            # Not the fields' types: a parser of command lines rewrites them.
            for key, kind in vars(base).get("__annotations__", {}).items():
                default = value.__dataclass_fields__[key].default
                lines.append(f"    {key}: {written(kind)} = {default!r}")
        return lines
    if issubclass(value, Exception):
        return [f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"]
    lines = [f"class {name}{signature(value)}"]
    if value in PLUG_IN_BASES:  # what a plug-in's class sets
        facts = vars(value).get("__annotations__", {}).items()
        lines += [f"    {key}: {kind}" for key, kind in facts if "ClassVar" in kind]
    inherited = {key for base in PLUG_IN_BASES if base in own[1:] for key in members([base])}
    for key, member in sorted(members(own).items()):
        if key in inherited:  # recorded once, with the base
            continue
        kind = "property " if isinstance(member, property) else ""
        function = getattr(member, "__func__", member)
        lines.append(f"    {kind}{key}{'' if kind else signature(function)}")
    return lines


def members(bases: list[type]) -> dict:
    """Public methods and properties that blocktune defines."""
    found: dict = {}
    for base in bases:
        for key, member in vars(base).items():
            public = not key.startswith("_") and key not in found
            routine = inspect.isroutine(member) or isinstance(member, property)
            if public and (routine or isinstance(member, classmethod | staticmethod)):
                found[key] = member
    return found


def interface() -> str:
    """The whole record."""
    parts = [HEADER]
    for module in (blocktune, blocktune.methods):
        lines = [line for name in sorted(module.__all__) for line in entry(module, name)]
        parts.append("\n".join([f"[{module.__name__}]", *lines, ""]))
    return "\n".join(parts)


def entry(module, name: str) -> list[str]:
    if name == "__version__":
        return []
    return describe(name, getattr(module, name))


def test_the_public_interface_is_the_recorded_one():
    before, now = RECORD.read_text().splitlines(), interface().splitlines()
    gone = [f"- {line}" for line in before if line not in now]
    new = [f"+ {line}" for line in now if line not in before]
    hint = "user code depends on these; if it is meant: python tests/downstream/test_api.py"
    assert before == now, "\n".join([hint, *gone, *new])


def test_a_parameter_that_changes_its_name_is_seen():
    def answer(examples, method="naive"): ...

    def renamed(examples, name="naive"): ...

    assert describe("answer", answer) == ["answer(examples, method='naive')"]
    assert describe("answer", answer) != describe("answer", renamed)


if __name__ == "__main__":
    RECORD.write_text(interface())
