"""Containers into torch. What needs torch runs where torch is installed: pip install 'df11[torch]'."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import df11


def test_torch_is_named_when_it_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from df11 import runtime; runtime.load_file('x.df11')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "pip install 'df11[torch]'" in result.stderr


def test_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    from df11 import runtime

    generator = np.random.default_rng(0)
    tensors = {
        "a.bf16": torch.from_numpy(generator.standard_normal((300, 70), dtype=np.float32)).to(torch.bfloat16),
        "all bf16": torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros((0, 4), dtype=torch.int64),
        "f8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16),
        "bool": torch.tensor([True, False]),
    }
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors")
    df11.convert(tmp_path / "x.safetensors", tmp_path / "x.df11")
    expected = load_file(tmp_path / "x.safetensors")
    loaded = runtime.load_file(tmp_path / "x.df11", device="cpu")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
