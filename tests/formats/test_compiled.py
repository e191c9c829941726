"""Compiling the kernels on a machine that has not done so yet."""

import os
import subprocess
import sys

import df11
from tests.support import sources


def test_nothing_in_the_working_folder_is_run(tmp_path):
    """A downloaded model may hold a numba.py: compiling while standing in its folder must not import it."""
    model = tmp_path / "model"
    model.mkdir()
    source = sources.write(model / "x.safetensors", [sources.bf16("w", (100, 100))])
    df11.convert(source, model / "x.df11")
    for name in ("numba", "llvmlite", "json", "df11"):
        (model / f"{name}.py").write_text("open('was_run', 'w').close()")
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}; import df11; df11.verify('x.df11')"
    environment = {**os.environ, "DF11_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=model, env=environment, check=True)
    assert list((tmp_path / "cache").iterdir())
    assert not (model / "was_run").exists()
