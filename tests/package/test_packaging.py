"""The package as users get it: a wheel, a zip of the checkout, an editable install, with and without a compiler."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from df11 import _kernels
from df11.version import __version__
from tests.support import sources

ROOT = Path(__file__).parents[2]
EXTENSION = "_kernels.abi3.so"
ROOMS = ("converter", "formats", "pipelines", "runtime", "storage")
NOT_IN_A_ZIP = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "data", "*.so")


def ignored(folder: str, names: list[str]) -> set[str]:
    """What a zip of the repository, which has no links, does not hold."""
    return {*NOT_IN_A_ZIP(folder, names), *(name for name in names if Path(folder, name).is_symlink())}


def attempt(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's PYTHONPATH and compiler."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CC", "MYPYPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed; returns its standard output."""
    done = attempt(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(folder: Path) -> Path:
    """A checkout as downloaded: nothing built, no links. Building leaves files behind."""
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "df11")


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """An sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def package_files() -> set[str]:
    """What the package must hold, according to the checkout."""
    files = {
        f"df11/{path.name}" for path in (ROOT / "src" / "df11").iterdir() if path.suffix in (".py", ".pyi", ".typed")
    }
    for room in ROOMS:
        for suffix in (".py", ".pyi", ".md", ".cu", ".toml", ".j2", ".js"):
            files |= {f"df11/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob(f"*{suffix}")}
    return files


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    assert wheel.name.startswith(f"df11-{__version__}-cp311-abi3-")  # any Python from 3.11 on
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    information = f"df11-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"df11", information}
    found = {name for name in names if name.startswith("df11/")}
    assert found == {*package_files(), f"df11/{EXTENSION}"}
    assert {"df11/py.typed", "df11/formats/SPEC.md", *(f"df11/{room}/__init__.py" for room in ROOMS)} <= found
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(built):
    with zipfile.ZipFile(built[1]) as file:
        information = f"df11-{__version__}.dist-info"
        metadata = email.message_from_bytes(file.read(f"{information}/METADATA"))
        scripts = file.read(f"{information}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == (
        "df11",
        __version__,
        "Apache-2.0",
    )
    assert {"convert", "hub", "torch", "cuda12", "cuda13", "all"} <= set(metadata.get_all("Provides-Extra"))
    base = {requirement for requirement in metadata.get_all("Requires-Dist") if "extra" not in requirement}
    assert {requirement.partition(">")[0] for requirement in base} == {"numpy", "xxhash", "zstandard"}
    assert "df11 = df11.__main__:main" in scripts
    assert "df11-convert = df11.__main__:convert_main" in scripts
    assert metadata.get_payload().strip().startswith("#")  # The README.


def test_every_cupy_that_is_allowed_compiles_for_the_gpus_that_are_named():
    # 13.3 for CUDA 12 does not know compute capability 12.0; 13 for CUDA 13 does not find NVRTC's builtins in wheels.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra, wheel, too_old, allowed in (
        ("cuda12", "cupy-cuda12x", "13.3.0", "13.4.0"),
        ("cuda13", "cupy-cuda13x", "13.6.0", "14.0.0"),
    ):
        requirement = next(found for line in extras[extra] if (found := Requirement(line)).name == wheel)
        assert allowed in requirement.specifier
        assert too_old not in requirement.specifier


def test_the_sdist_is_whole(built):
    with tarfile.open(built[0]) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(members)
    sources = {
        path.relative_to(ROOT).as_posix() for room in ("src/df11", *ROOMS) for path in (ROOT / room).glob("*.[ch]")
    }
    assert {"src/df11/_kernels.c", "formats/kernels.h"} <= sources
    inside = {name.removeprefix("df11/") for name in package_files()}
    files = {name if name.startswith(ROOMS) else f"src/df11/{name}" for name in inside} | sources
    assert files <= {name for name, member in members.items() if member.isfile()}


def environment(folder: Path) -> Path:
    """A fresh virtual environment that sees this one's packages: nothing is downloaded. Returns its scripts folder."""
    venv.create(folder)
    scripts = folder / "bin"
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return scripts


LIST_PACKAGES = "import sys; sys.path.insert(0, '.'); import build_backend; print(*build_backend.packages())"


def install(scripts: Path, *what: object) -> None:
    """Install into a virtual environment with this one's pip."""
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--no-deps",
        "--no-build-isolation",
        *what,
        cwd=scripts,
    )


def check_use(scripts: Path, folder: Path, home: Path) -> None:
    """Check that df11 works in this environment, in a folder of its own, and is imported from below ``home``."""
    folder.mkdir()
    modules = ("df11", "df11.runtime", "df11.converter", "df11.pipelines", "df11.formats.layout", "df11._kernels")
    code = f"import sys, {', '.join(modules)}\nfor name in {modules}: print(sys.modules[name].__file__)"
    for line in run(scripts / "python", "-c", code, cwd=folder).splitlines():
        assert Path(line).is_relative_to(home), line
    assert run(scripts / "df11", "--version", cwd=folder) == f"df11 {__version__}\n"
    assert run(scripts / "python", "-m", "df11", "--version", cwd=folder) == f"df11 {__version__}\n"
    source = sources.write(folder / "x.safetensors", [sources.bf16("w", (200, 100))])
    run(scripts / "df11-convert", "x.safetensors", "x.df11", cwd=folder)
    run(scripts / "df11", "restore", "x.df11", "y.safetensors", cwd=folder)
    assert (folder / "y.safetensors").read_bytes() == source.read_bytes()


def test_the_wheel_installs_and_works(built, tmp_path):
    scripts = environment(tmp_path / "venv")
    install(scripts, "--no-index", built[1])
    check_use(scripts, tmp_path / "elsewhere", tmp_path / "venv")


def test_a_zip_of_the_repository_installs_and_works(checkout, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "df11"), "zip", checkout.parent, checkout.name)
    scripts = environment(tmp_path / "venv")
    install(scripts, archive)
    check_use(scripts, tmp_path / "elsewhere", tmp_path / "venv")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a zip has no repository to clone")
def test_a_clone_needs_no_links(tmp_path):
    run(
        "git",
        "-c",
        "core.symlinks=false",
        "clone",
        "--quiet",
        "--depth",
        "1",
        ROOT.as_uri(),
        tmp_path / "clone",
        cwd=tmp_path,
    )
    listing = run("git", "ls-files", "--stage", cwd=tmp_path / "clone")
    assert "build_backend.py" in listing
    assert not [line for line in listing.splitlines() if line.startswith("120000")]
    names = set(run(sys.executable, "-c", LIST_PACKAGES, cwd=tmp_path / "clone").split())
    assert {"df11", *(f"df11.{room}" for room in ROOMS)} <= names


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout, and the scripts folder of an environment into which it is installed."""
    folder = tmp_path_factory.mktemp("editable")
    checkout = copy_checkout(folder / "df11")
    scripts = environment(folder / "venv")
    install(scripts, "--editable", checkout)
    return checkout, scripts


def test_an_editable_install_works(editable, tmp_path):
    checkout, scripts = editable
    check_use(scripts, tmp_path / "elsewhere", checkout)


def test_an_editable_install_follows_the_checkout(editable, tmp_path):
    checkout, scripts = editable
    (checkout / "formats" / "brand_new.py").write_text("def answer() -> int:\n    return 42\n")
    code = "from df11.formats import brand_new; print(brand_new.answer.__code__.co_filename)"
    assert Path(run(scripts / "python", "-c", code, cwd=tmp_path).strip()).samefile(
        checkout / "formats" / "brand_new.py"
    )
    with (checkout / "src" / "df11" / "version.py").open("a") as file:
        file.write('\n__version__ = "9.9"\n')
    try:
        assert run(scripts / "df11", "--version", cwd=tmp_path) == "df11 9.9\n"
    finally:
        shutil.copy(ROOT / "src" / "df11" / "version.py", checkout / "src" / "df11" / "version.py")


def test_a_breakpoint_in_an_editable_install_is_reached(editable, tmp_path):
    checkout, scripts = editable
    (checkout / "formats" / "stopping.py").write_text("def stop(inner: str) -> None:\n    print(inner)\n")
    (tmp_path / "program.py").write_text("from df11.formats import stopping\nstopping.stop('here')\n")
    commands = [
        "-c",
        f"b {checkout / 'src' / 'df11' / 'formats' / 'stopping.py'}:2",
        "-c",
        "c",
        "-c",
        "p [inner]",
        "-c",
        "q",
    ]
    shown = run(scripts / "python", "-m", "pdb", *commands, "program.py", cwd=tmp_path)
    assert "['here']" in shown


def test_mypy_sees_an_editable_install(editable, tmp_path):
    _, scripts = editable
    command = (
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        scripts / "python",
        "--follow-imports",
        "skip",
        "--cache-dir",
        tmp_path,
        "-c",
    )
    run(*command, "import df11.formats.record, df11.runtime.kernels", cwd=tmp_path)
    assert "import-not-found" in attempt(*command, "import df11.formats.no_such_module", cwd=tmp_path).stdout


def test_an_editable_install_works_where_no_links_can_be_made(tmp_path):
    checkout = copy_checkout(tmp_path / "df11")
    code = (
        "import os, sys; os.symlink = lambda *arguments, **options: open('/no/such/file')\n"
        "sys.path.insert(0, '.'); import build_backend; build_backend.build_editable(sys.argv[1])"
    )
    done = attempt(sys.executable, "-c", code, tmp_path, cwd=checkout)
    assert done.returncode == 0, done
    assert "df11: src/df11 has no links" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    scripts = environment(tmp_path / "venv")
    install(scripts, "--no-index", wheel)
    check_use(scripts, tmp_path / "elsewhere", checkout)


def test_what_is_in_the_way_of_a_link_is_named(tmp_path):
    checkout = copy_checkout(tmp_path / "df11")
    (checkout / "src" / "df11" / "formats").mkdir()
    done = attempt(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path,
        "--editable",
        ".",
        cwd=checkout,
    )
    assert done.returncode
    assert f"{Path('src', 'df11', 'formats')} is in the way of a link" in done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a machine without a compiler. With a warm cache, building takes seconds."""
    return {"PATH": str(tmp_path_factory.mktemp("bare")), "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig")}


def test_without_a_compiler_zig_builds(built, bare, tmp_path):
    """``build`` checks that what the backend requires is installed, in the right version."""
    shutil.unpack_archive(built[0], tmp_path)
    (source,) = tmp_path.iterdir()
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path)
    assert "-m ziglang cc" in run(*command, cwd=source, **bare)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == built[1].name
    shutil.unpack_archive(wheel, tmp_path / "package", "zip")
    code = "import df11._kernels as kernels; print(kernels.__file__, kernels.INSTRUCTIONS, sep='\\n')"
    path, instructions = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "package")
    ).splitlines()
    assert Path(path).is_relative_to(tmp_path)
    assert instructions == _kernels.INSTRUCTIONS  # Its code must not be slower than another compiler's.


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        pytest.param({}, "df11 needs a C compiler to build: apt install gcc", id="none"),
        pytest.param({"CC": "/no/such/compiler"}, "df11: the C compiler failed, see above: ", id="broken"),
    ],
)
def test_without_any_compiler_one_line_says_what_to_do(checkout, bare, tmp_path, variables, line):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ziglang'] = None\n")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".")
    done = attempt(*command, cwd=checkout, PYTHONPATH=str(tmp_path), **bare, **variables)
    assert done.returncode
    assert [shown for shown in done.stderr.splitlines() if line in shown], done.stderr
    assert not list(tmp_path.glob("*.whl"))


# What the limited API needs from the pyconfig.h of Python on Windows. In this, macOS and Linux agree with each other.
WINDOWS = """
#define MS_WINDOWS
#define MS_WIN64
#define HAVE_DECLSPEC_DLL
#define Py_ENABLE_SHARED
#define HAVE_PY_SSIZE_T 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SYS_TYPES_H 1
#define PY_SSIZE_T_MAX LLONG_MAX
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_PID_T 4
#define SIZEOF_SIZE_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 2
typedef long long Py_ssize_t;
"""


@pytest.mark.parametrize(
    "target", ["x86_64-windows-gnu", "x86_64-macos", "aarch64-macos", "aarch64-linux-gnu.2.17", "x86_64-linux-musl"]
)
def test_the_extension_compiles_elsewhere_without_a_warning(target, tmp_path):
    headers = Path(sysconfig.get_path("include"))
    if "windows" in target:
        headers = Path(shutil.copytree(headers, tmp_path / "include"))
        (headers / "pyconfig.h").write_text(WINDOWS)
    flags = (
        "-c",
        "-std=c11",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Werror",
        "-DPy_LIMITED_API=0x030B0000",
        f"-I{headers}",
    )
    for source in (
        "src/df11/_kernels.c",
        "formats/cpu.c",
        "formats/decode.c",
        "converter/encode.c",
        "converter/sha256.c",
    ):
        output = tmp_path / f"{Path(source).stem}.o"
        command = (sys.executable, "-m", "ziglang", "cc", "-target", target, *flags, ROOT / source, "-o", output)
        run(*command, cwd=tmp_path, ZIG_GLOBAL_CACHE_DIR=str(ROOT / "build" / "zig"))
        assert output.stat().st_size
