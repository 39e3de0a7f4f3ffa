"""Unlearning methods by name, each in the file of that name in this folder.

A method's file has a dataclass `Flags` and a function `terms(flags, parts) -> list[Term]`; see `terms.py`. What is
worth tuning may stand in it as `TUNING`, lines of a grid: ("remove-coef=1,3,10", ...). Learning rates do not: they are
the model's, and alike for all methods.
To add one: write the file, and its name below.
"""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

METHODS = (
    "lens",
    "next-token",
    "rmu",
    "circuit-breakers",
    "grad-diff",
    "wga",
    "npo",
    "simnpo",
    "undial",
    "idk",
    "max-entropy",
    "ignorant-teacher",
    "distill",
    "distort",
    "reset",
)

# What the flags of a method may import: torch takes a second, and `--help` must not wait for it.
LIGHT = frozenset(("dataclasses", "typing", "math", "unlearn.config", "unlearn.errors", "unlearn.flags"))


def method_module(method: str) -> ModuleType:
    """The file of a method, imported."""
    return importlib.import_module(f"{__name__}.{_stem(method)}")


def flags_of(method: str) -> type[Any]:
    """The class `Flags` of a method, read from its file without importing the rest of it.

    Only that class and the imports from `LIGHT` are executed, in a module of their own.
    """
    name = f"{__name__}.{_stem(method)}_flags"
    if name not in sys.modules:
        file = Path(__file__).with_name(f"{_stem(method)}.py")
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        tree.body = [node for node in tree.body if _is_light(node)]
        module = ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module  # where dataclasses, and tyro for the help texts, look for a class's file
        exec(compile(tree, str(file), "exec"), module.__dict__)
    flags: type[Any] = sys.modules[name].Flags
    return flags


def tuning_of(method: str) -> tuple[str, ...]:
    """The grid `TUNING` of a method, read from its file without importing it; () where it names none."""
    file = Path(__file__).with_name(f"{_stem(method)}.py")
    for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["TUNING"]:
            return tuple(ast.literal_eval(node.value))
    return ()


def docstring_of(method: str) -> str:
    """What the file of a method says of it, read without importing it."""
    file = Path(__file__).with_name(f"{_stem(method)}.py")
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"), str(file))) or ""


def _is_light(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module in LIGHT
    if isinstance(node, ast.Import):
        return all(alias.name in LIGHT for alias in node.names)
    return isinstance(node, ast.ClassDef) and node.name == "Flags"


def _stem(method: str) -> str:
    return method.replace("-", "_")
