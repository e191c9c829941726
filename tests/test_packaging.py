"""The package as users get it: the wheel that is built from the sdist, and an editable install, each used from another folder."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from df11.version import __version__
from tests import commands, sources

ROOT = Path(__file__).parent.parent
ROOMS = ("converter", "formats", "pipelines", "runtime")
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "data")


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed, without this process's PYTHONPATH; returns its standard output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, links included: building leaves files behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "df11", symlinks=True, ignore=IGNORED))


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """An sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def package_files() -> set[str]:
    """What the package must hold, by the checkout."""
    files = {f"df11/{path.name}" for path in (ROOT / "src" / "df11").iterdir() if path.is_file()}
    for room in ROOMS:
        for suffix in (".py", ".md", ".cu", ".css", ".js"):
            files |= {f"df11/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob(f"*{suffix}")}
    return files


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    assert wheel.name == f"df11-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    information = f"df11-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"df11", information}
    found = {name for name in names if name.startswith("df11/")}
    assert found == package_files()
    assert {"df11/py.typed", "df11/formats/SPEC.md", *(f"df11/{room}/__init__.py" for room in ROOMS)} <= found
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(built):
    with zipfile.ZipFile(built[1]) as file:
        information = f"df11-{__version__}.dist-info"
        metadata = email.message_from_bytes(file.read(f"{information}/METADATA"))
        scripts = file.read(f"{information}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("df11", __version__, "Apache-2.0")
    assert {"convert", "hub", "torch", "cuda12", "cuda13", "all"} <= set(metadata.get_all("Provides-Extra"))
    base = {requirement for requirement in metadata.get_all("Requires-Dist") if "extra" not in requirement}
    assert {requirement.partition(">")[0] for requirement in base} == {"numpy", "xxhash", "zstandard"}
    assert "df11 = df11.__main__:main" in scripts
    assert "df11-convert = df11.__main__:convert_main" in scripts
    assert metadata.get_payload().strip().startswith("#")  # The README.


def test_the_sdist_is_whole(built):
    with tarfile.open(built[0]) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(members)
    assert {f"src/{name}" for name in package_files()} <= {name for name, member in members.items() if member.isfile()}


def environment(folder: Path) -> Path:
    """A fresh virtual environment that finds this one's packages, so that nothing need be downloaded. Returns its folder of scripts."""
    venv.create(folder)
    scripts = folder / "bin"
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return scripts


def install(scripts: Path, *what: object) -> None:
    """Install into a virtual environment, with this one's pip."""
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-build-isolation", *what, cwd=scripts)


def check_use(scripts: Path, folder: Path, home: Path) -> None:
    """df11 works in this environment, from a folder of its own, and is imported from below ``home``."""
    commands.compile_kernels()
    folder.mkdir()
    code = (
        "import df11, df11.runtime, df11.converter, df11.pipelines, df11.formats.layout as layout; print(df11.__file__, layout.__file__, sep='\\n')"
    )
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


def test_an_editable_install_works(checkout, tmp_path):
    scripts = environment(tmp_path / "venv")
    install(scripts, "--editable", checkout)
    check_use(scripts, tmp_path / "elsewhere", checkout)
    # It is the checkout that is used, not a copy of it.
    with (checkout / "src" / "df11" / "version.py").open("a") as file:
        file.write('\n__version__ = "9.9"\n')
    try:
        assert run(scripts / "df11", "--version", cwd=tmp_path) == "df11 9.9\n"
    finally:
        shutil.copy(ROOT / "src" / "df11" / "version.py", checkout / "src" / "df11" / "version.py")
