"""Machine code of kernels: compiled once by Numba, kept in a cache, and loaded without Numba.

Importing Numba and setting up its compiler takes half a second and 60 MiB in every process; the machine code needs neither. Each kernel
module has a table ``EXPORTS``: name -> function of one pointer to i64 arguments (an array is two of them: address and size). They are
compiled in a process of its own into one object file, named by everything that it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from df11.formats import errors

CACHE_VARIABLE: Final = "DF11_CACHE_DIR"
_PREFIX: Final = "df11_"


def announce(text: str) -> None:
    """Told when something takes long; the command line replaces it."""


class Kernel:
    """A compiled function. Calls release the interpreter lock."""

    def __init__(self, address: int) -> None:
        self._function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)

    def __call__(self, *arguments: np.ndarray[Any, Any] | int) -> int:
        """Call with contiguous arrays and integers; returns what the kernel returns."""
        values: list[int] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                if not (argument.flags.c_contiguous and argument.flags.aligned):
                    raise ValueError("kernels take contiguous, aligned arrays")
                values += (argument.ctypes.data, argument.size)
            else:
                values.append(int(argument))
        block = (ctypes.c_int64 * len(values))(*values)
        return int(self._function(ctypes.addressof(block)))


class Library:
    """The kernels of one module, loaded (and compiled, if this machine has not yet) at the first call of one of them."""

    def __init__(self, module: str, *sources: str) -> None:
        """``module`` has the table EXPORTS; ``sources``: the other modules that its machine code depends on."""
        self._module = module
        self._sources = (module, __spec__.name, *sources)
        self._lock = threading.Lock()
        self._kernels: dict[str, Kernel] | None = None
        self._engine: Any = None

    def load(self) -> dict[str, Kernel]:
        """Load the kernels, if that has not been done, and return them."""
        with self._lock:
            if self._kernels is None:
                self._kernels = self._load()
                _give_back_llvm()
        return self._kernels

    def __getitem__(self, name: str) -> Kernel:
        return self.load()[name]

    def _load(self) -> dict[str, Kernel]:
        try:
            import llvmlite.binding as llvm
        except ModuleNotFoundError:
            raise errors.missing_extra("numba", "convert") from None
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        names, code = self._machine_code(self._file_name(llvm))
        for name in names["external"]:
            # The error paths of Numba's wrappers, which these kernels never take.
            if llvm.address_of_symbol(name) is None:
                llvm.add_symbol(name, ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value)
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return {name: Kernel(self._engine.get_function_address(_PREFIX + name)) for name in names["kernels"]}

    def _machine_code(self, name: str) -> tuple[dict[str, list[str]], bytes]:
        # From the cache; compiled first if it is not there, or cannot be read; without a cache if there cannot be one.
        folder = cache_folder()
        if folder is not None:
            try:
                return _unpack((folder / name).read_bytes())
            except (OSError, ValueError):
                pass
        with tempfile.TemporaryDirectory(prefix="df11-") as temporary:
            target = Path(temporary) / name
            self._compile(target)
            data = target.read_bytes()
        if folder is not None:
            with contextlib.suppress(OSError):
                _store(folder / name, data)
        return _unpack(data)

    def _file_name(self, llvm: Any) -> str:
        digest = hashlib.sha256()
        for module in self._sources:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise ImportError(module)
            digest.update(Path(spec.origin).read_bytes())
        parts = (llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
        digest.update(repr(parts).encode())
        return f"{self._module}-{digest.hexdigest()[:20]}.kernels"

    def _compile(self, path: Path) -> None:
        announce("compiling for this processor, once; it takes some ten seconds")
        # Never from the working folder: it may be a model from anywhere, and hold a numba.py.
        command = [sys.executable, "-P", "-m", "df11.formats.compiled", self._module, str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)  # noqa: S603 - our own module
        if result.returncode:
            if "No module named 'numba'" in result.stderr:
                raise errors.missing_extra("numba", "convert")
            raise RuntimeError(f"the kernels of {self._module} do not compile:\n{result.stderr}")


def _give_back_llvm() -> None:
    # LLVM has done its work: drop its code and constants from memory. These pages are never written to, so they come back from the file
    # if they are needed. Depending on the page cache, they are up to 100 MiB of what counts as this process's memory.
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in maps.read_text().splitlines():
        addresses, permissions, offset, *_ = line.split()
        # Of the read-only parts only the one at the start of the file: a later one has been relocated, and must stay.
        if "libllvmlite" in line and (permissions.startswith("r-x") or (permissions.startswith("r--") and int(offset, 16) == 0)):
            start, end = (int(address, 16) for address in addresses.split("-"))
            madvise(start, end - start, mmap.MADV_DONTNEED)


def cache_folder() -> Path | None:
    """Where machine code is kept: ``$DF11_CACHE_DIR``, else ``$XDG_CACHE_HOME/df11``, else ``~/.cache/df11``; None without a home."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "df11"
    except RuntimeError:
        return None


def _store(path: Path, data: bytes) -> None:
    # Several processes may do so at once; each renames a file of its own.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _pack(names: dict[str, list[str]], code: bytes) -> bytes:
    head = json.dumps(names).encode()
    body = len(head).to_bytes(8, "little") + head + code
    return hashlib.sha256(body).digest() + body


def _unpack(data: bytes) -> tuple[dict[str, list[str]], bytes]:
    body = data[32:]
    if hashlib.sha256(body).digest() != data[:32]:
        raise ValueError("damaged")
    size = int.from_bytes(body[:8], "little")
    names: dict[str, list[str]] = json.loads(body[8 : 8 + size])
    return names, body[8 + size :]


def compile_module(module: str) -> bytes:
    """Compile all exports of a kernel module for this processor; returns what the cache holds."""
    import llvmlite.binding as llvm
    from numba import cfunc, types

    pointer: Any = types.CPointer
    exports: dict[str, Any] = importlib.import_module(module).EXPORTS
    whole = llvm.parse_assembly("")
    for name, function in exports.items():
        compiled = cfunc(types.int64(pointer(types.int64)))(function)
        part = llvm.parse_assembly(compiled.inspect_llvm())
        part.get_function(compiled.native_name).name = _PREFIX + name
        whole.link_in(part)
    whole.verify()
    external = [f.name for f in whole.functions if f.is_declaration and not f.name.startswith("llvm.")]
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="pic", codemodel="default"
    )
    return _pack({"kernels": list(exports), "external": external}, machine.emit_object(whole))


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(compile_module(sys.argv[1]))
