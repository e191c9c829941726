"""Builds df11: setuptools, plus what it lacks.

The package's folders are at the top level. A wheel takes them from there. An editable install links them into
``src/df11``, so that ``src`` holds the package as it is imported. Type checkers, editors and debuggers then see the
files of the checkout.

If there is no C compiler, pip is asked to install one for the build: Zig, which is an ordinary package.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import util
from pathlib import Path
from typing import Any, Final

from setuptools import build_meta, find_packages
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError
from setuptools.extension import Extension

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOMS: Final = ("converter", "formats", "pipelines", "runtime", "storage")
ZIG: Final = "ziglang==0.17.1"
# One build serves all versions of Python but the free-threaded ones, which have no stable ABI.
LIMITED: Final = not sysconfig.get_config_var("Py_GIL_DISABLED")

_HERE: Final = Path(__file__).resolve().parent
_FLAGS: Final = ["-std=c11", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
_linked = False


def packages() -> list[str]:
    """All packages, by their names."""
    inner = [f"{room}.{name}" for room in ROOMS for name in find_packages(str(_HERE / room))]
    return ["df11", *(f"df11.{name}" for name in (*ROOMS, *inner))]


def package_dir() -> dict[str, str]:
    """Where packages are: once linked, all below ``src``, which setuptools then simply puts on the path."""
    return {"": "src"} | ({} if _linked else {f"df11.{room}": room for room in ROOMS})


def _link(room: str) -> None:
    link, target = _HERE / "src" / "df11" / room, _HERE / room
    if link.exists() and link.samefile(target):
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise BaseError(f"df11: {link} is in the way of a link to {target}: remove it")
    try:
        link.symlink_to(Path("..", "..", room), target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi

        _winapi.CreateJunction(str(target), str(link))  # Unlike symbolic links, these need no privilege on Windows.


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 517. On its own, setuptools would pack leftovers of earlier builds that are no longer in the sources."""
    for left in (_HERE / "build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 660. If the links cannot be made, setuptools' own finder takes their place at run time."""
    global _linked
    try:
        for room in ROOMS:
            _link(room)
        _linked = True
    except OSError as error:
        print(
            "df11: src/df11 has no links to the package's folders; type checkers and editors may not find them: "
            f"{error}",
            file=sys.stderr,
        )
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if _find_compiler() else [ZIG])]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """PEP 660."""
    return get_requires_for_build_wheel(config_settings)


def _find_compiler() -> bool:
    """Whether there is a C compiler that runs. Sets ``CC`` if it is not the one that built this Python."""
    if sys.platform == "win32":
        from setuptools._distutils.ccompiler import new_compiler

        try:
            new_compiler().initialize()  # type: ignore[attr-defined]
        except BaseError:
            return False
        return True
    if "CC" in os.environ:
        return True
    built_with = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    for name in (built_with, "cc", "gcc", "clang"):
        # macOS has a cc that only says how to install one.
        if (path := shutil.which(name)) and subprocess.run(
            [path, "--version"], capture_output=True, check=False
        ).returncode == 0:
            if name != built_with:
                os.environ["CC"] = name
            return True
    return False


class BuildExtension(build_ext):
    """Compiles with the machine's compiler, or else with Zig. Never continues without the extension."""

    def run(self) -> None:
        """Choose the compiler before setuptools sets its own up."""
        _find_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        if not any(Path(sysconfig.get_path(kind), "Python.h").exists() for kind in ("include", "platinclude")):
            raise CompileError("df11 needs Python.h to build: apt install python3-dev (or the like)")
        if _find_compiler():
            ext.extra_compile_args = ["/O2", "/std:c11"] if self.compiler.compiler_type == "msvc" else _FLAGS
            try:
                super().build_extension(ext)
            except (CCompilerError, BaseError, OSError) as error:
                raise CompileError(
                    f"df11: the C compiler failed, see above: {error}; CC can name another one"
                ) from error
        elif util.find_spec("ziglang"):
            self._build_with_zig(ext)
        else:
            raise CompileError(
                "df11 needs a C compiler to build: apt install gcc (or the like), "
                f"or let pip reach an index that has {ZIG}, or pip install {ZIG}"
            )

    def _build_with_zig(self, ext: Extension) -> None:
        target, options = _zig_target()
        output, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        linked = folder / output.name  # On Windows, a .lib and a .pdb come with it.
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        include = [f"-I{path}" for path in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "-target",
            target,
            "-mcpu=baseline",
            "-shared",
            "-fPIC",
            *_FLAGS,
            *macros,
            *include,
        ]
        command += [*ext.sources, "-o", str(linked), *options]
        print(shlex.join(command), flush=True)
        # Zig's shared cache would put 50 MB into the home folder.
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise CompileError(
                f"Zig could not compile {ext.name}, see above; "
                "with a C compiler (apt install gcc, or the like) df11 builds without it"
            )
        shutil.copyfile(linked, output)


def _zig_target() -> tuple[str, list[str]]:
    """The machine as Zig names it, and the extra options for linking."""
    machine = platform.machine().lower()
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if sys.platform == "win32":
        return f"{processor}-windows-gnu", [
            str(
                Path(
                    sys.base_prefix,
                    "libs",
                    "python3.lib" if LIMITED else f"python{sysconfig.get_config_var('py_version_nodot')}t.lib",
                )
            )
        ]
    if sys.platform == "darwin":
        return f"{processor}-macos.11.0", ["-Wl,-undefined,dynamic_lookup"]
    if processor not in ("x86_64", "aarch64"):
        raise CompileError(
            f"df11 has not been tried with Zig on {machine}: install a C compiler (apt install gcc, or the like)"
        )
    musl = "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE"))
    return f"{processor}-linux-{'musl' if musl else 'gnu.2.17'}", []
