"""Builds df11: setuptools, and what it lacks.

The package's rooms are top-level folders. A wheel takes them from there. An editable install links them into ``src/df11``, so that ``src`` holds the
package as it is imported, and type checkers, editors and debuggers see the files of the checkout.

Where no C compiler is found, pip is asked to bring one for the build: Zig, which is a package like any other.
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

ROOMS: Final = ("converter", "formats", "pipelines", "runtime")
ZIG: Final = "ziglang==0.17.1"
# One build serves all versions of Python, but for the free-threaded ones, which have no stable interface.
LIMITED: Final = not sysconfig.get_config_var("Py_GIL_DISABLED")

_HERE: Final = Path(__file__).resolve().parent
_FLAGS: Final = ["-std=c11", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
_linked = False


def packages() -> list[str]:
    """All packages, by their names."""
    inner = [f"{room}.{name}" for room in ROOMS for name in find_packages(str(_HERE / room))]
    return ["df11", *(f"df11.{name}" for name in (*ROOMS, *inner))]


def package_dir() -> dict[str, str]:
    """Where packages lie; once the rooms are linked, all below ``src``, which setuptools then simply puts on the path."""
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

        _winapi.CreateJunction(str(target), str(link))  # Windows wants a right for symbolic links, but none for these.


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 517. setuptools alone would pack what an earlier build has left and the sources no longer hold."""
    for left in (_HERE / "build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 660. Where there are no links, setuptools' own finder takes their place at run time."""
    global _linked
    try:
        for room in ROOMS:
            _link(room)
        _linked = True
    except OSError as error:
        print(
            f"df11: no links to the rooms in src/df11, so that type checkers and editors may not find them: {error}",
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
    """Whether there is a C compiler that runs. Sets ``CC`` if it is another than the one that built this Python."""
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
        # macOS has a cc that only says how to get one.
        if (path := shutil.which(name)) and subprocess.run(
            [path, "--version"], capture_output=True, check=False
        ).returncode == 0:
            if name != built_with:
                os.environ["CC"] = name
            return True
    return False


class BuildExtension(build_ext):
    """Compiles with the machine's compiler, else with Zig's. Never goes on without the extension."""

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
                f"df11 needs a C compiler to build: apt install gcc (or the like), or let pip reach an index that has {ZIG}, or pip install {ZIG}"
            )

    def _build_with_zig(self, ext: Extension) -> None:
        target, options = _zig_target()
        output, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        linked = folder / output.name  # On Windows, with a .lib and a .pdb beside it, which the package does not want.
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
        # The cache for all of Zig's users would be 50 MB in the home folder, which a build need not have.
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise CompileError(
                f"Zig could not compile {ext.name}, see above; with a C compiler (apt install gcc, or the like) df11 builds without it"
            )
        shutil.copyfile(linked, output)


def _zig_target() -> tuple[str, list[str]]:
    """The machine as Zig names it, and what linking takes there."""
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
