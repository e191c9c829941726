"""Where OmniGen2's own classes come from: its package, a checkout of its repository, or files beside the weights."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from df11.formats import errors

REPOSITORY: Final = "https://github.com/VectorSpaceLab/OmniGen2"
HOMES: Final = {
    "OmniGen2Transformer2DModel": "omnigen2.models.transformers.transformer_omnigen2",
    "OmniGen2Pipeline": "omnigen2.pipelines.omnigen2.pipeline_omnigen2",
    "OmniGen2ChatPipeline": "omnigen2.pipelines.omnigen2.pipeline_omnigen2_chat",
    "FlowMatchEulerDiscreteScheduler": "omnigen2.schedulers.scheduling_flow_match_euler_discrete",
}


def import_library(name: str) -> Any:
    """A module by its name. Raises MissingExtraError if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise errors.MissingExtraError(
            f"the package {package!r} is not installed", hint=f"run: pip install {package}"
        ) from error


def known_classes(classes: Any) -> Callable[[str, str], Any]:
    """A function from a class name, and the library that the model folder gives for it, to the class or None.

    ``classes``: a module or object that has the classes, the folder of a checkout, or None for the installed package.
    """
    if isinstance(classes, (str, os.PathLike)):
        _use_checkout(Path(classes))
        classes = None
    package = "omnigen2" in sys.modules or (classes is None and importlib.util.find_spec("omnigen2") is not None)

    def find(name: str, library: str) -> Any:
        found = getattr(classes, name, None)
        # OmniGen2's modules also import a scheduler of diffusers that has the same name as theirs.
        if found is not None and not found.__module__.startswith("diffusers."):
            return found
        home = library if library.startswith("omnigen2.") else HOMES.get(name)
        return getattr(import_library(home), name, None) if package and home else None

    return find


def _use_checkout(folder: Path) -> None:
    if not (folder / "omnigen2" / "__init__.py").is_file():
        raise errors.MissingError(
            "not a checkout of OmniGen2's repository", file=folder, hint=f"git clone {REPOSITORY}"
        )
    loaded = getattr(sys.modules.get("omnigen2"), "__file__", None)
    if loaded is not None and Path(loaded).resolve().parent != (folder / "omnigen2").resolve():
        raise errors.UsageError("another omnigen2 is already imported", file=folder, found=loaded)
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def execute(file: Path, allowed: frozenset[str]) -> Any:
    """The module of a Python file, which is executed together with the files in its folder that it imports.

    Raises NotAllowedError, before anything is executed, unless ``allowed`` has the names of all, without suffix.
    """
    folder, pending, seen = file.parent.resolve(), [file.stem], set[str]()
    while pending:
        stem = pending.pop()
        if stem in seen:
            continue
        seen.add(stem)
        source = folder / f"{stem}.py"
        if stem not in allowed:
            raise errors.NotAllowedError(
                f"{file.name} imports code that is not allowed", file=source, hint=f"add {stem!r} to trust_remote_code"
            )
        if not source.is_file():
            raise errors.MissingError(f"{file.name} imports a file that does not exist", file=source)
        pending += _imports_of(source)
    package = f"df11_remote_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return import_library(f"{package}.{file.stem}")


def _imports_of(source: Path) -> list[str]:
    names: list[str] = []
    try:
        nodes = list(ast.walk(ast.parse(source.read_bytes())))
    except (SyntaxError, ValueError):
        raise errors.UsageError("not a Python file", file=source) from None
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return names
