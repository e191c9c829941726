"""What running a model compressed costs: ``make gpu-omnigen2`` or ``python -m benchmarks.gpu.models``, on a GPU.

The blocks of OmniGen2's transformer and a language model of the size of its mllm, in full size, with random weights:
time depends on the shapes, not on the values. BF16 and df11 run in the same process; for each output, the values that
are not equal to those of BF16 to the bit are counted. The pipeline's other parts (vae, scheduler, text) are the same
for both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks import results, synthetic
from benchmarks.gpu import report, weights
from benchmarks.gpu.omnigen2_blocks import Transformer
from benchmarks.gpu.report import Column, Row
from df11 import runtime
from df11.runtime import modules
from df11.runtime.model import SMALL
from df11.runtime.prefetch import CudaStreams
from df11.runtime.weight import CompressedWeight

PREDICTIONS: Final = 2
"""A step predicts twice, with the text and without, for guidance."""
TEXT_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class Size:
    """``layers`` of both models, ``tokens`` of the image (1024 x 1024 pixels: 4096), ``steps``.

    ``generated``: tokens of text. ``vocabulary``: of the language model.
    """

    layers: int = 32
    tokens: int = 4096
    steps: int = 50
    generated: int = 128
    vocabulary: int = 151_936
    width: int = 2048


SMALLEST: Final = Size(layers=1, tokens=16, steps=1, generated=3, vocabulary=1000, width=256)


def randomize(model: nn.Module, device: torch.device) -> nn.Module:
    """Give a model on the meta device random BF16 weights with the statistics of trained ones."""
    model.to(torch.bfloat16).to_empty(device=device)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()  # to_empty makes two of a parameter that two modules share.
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        is_norm = parameter.dim() == 1 and not name.endswith("bias")
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator, device=device).mul_(0.02).add_(1.0 if is_norm else 0.0)
        )
    return model.eval()


def compress(model: nn.Module) -> None:
    """Compress the large weights of a model in place, as ``load_model`` would have loaded them."""
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.numel() >= SMALL and parameter.dtype == torch.bfloat16:
                if id(parameter) not in made:
                    weight = CompressedWeight.of(weights.compress(parameter.data))
                    made[id(parameter)] = nn.Parameter(weight, requires_grad=False)
                setattr(module, name, made[id(parameter)])


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """How many values differ, tokens or BF16 numbers to the bit; all of them if their number differs."""
    if found.shape != expected.shape:
        return max(found.numel(), expected.numel())
    if found.dtype == torch.bfloat16:
        found, expected = found.view(torch.int16), expected.view(torch.int16)
    return int((found != expected).sum())


class Bench:
    """The models, and what is measured on them."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device = device
        self.size = size
        self.real = device.type == "cuda"

    @contextmanager
    def _measured(self, row: Row) -> Iterator[None]:
        if self.real:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if self.real:
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["seconds"] = time.perf_counter() - start

    def _compare(self, what: str, model: nn.Module, run: Callable[[], torch.Tensor]) -> list[Row]:
        rows: list[Row] = []
        expected: torch.Tensor | None = None
        for name in (
            "BF16",
            "df11",
            "df11, next weight prefetched",
            "df11 again",
            "df11, records in CPU memory",
        ):
            if name == "df11":
                compress(model)
            elif "prefetched" in name:
                if not self.real:
                    continue
                modules.enable_prefetch(model, self.device, CudaStreams(self.device))
            elif "again" in name:
                modules.disable_prefetch(model)
            elif "CPU" in name:
                modules.offload_records(model, self.device)
            if self.real:
                torch.cuda.empty_cache()
            row: Row = {
                "what": what,
                "name": name,
                "held_bytes": runtime.memory_report(model).compressed + runtime.memory_report(model).verbatim,
            }
            run()  # Once, to warm up.
            with self._measured(row):
                found = run()
            expected = found if expected is None else expected
            row["differing"] = differing(found, expected)
            rows.append(row | {"of_bf16": row["seconds"] / rows[0]["seconds"] if rows else 1.0})
        runtime.check_errors(self.device)
        return rows

    def image(self) -> list[Row]:
        """The blocks of OmniGen2's transformer: all steps of an image, with two predictions per step."""
        config = synthetic.omnigen2()["configs"]["transformer/config.json"] | {"num_layers": self.size.layers}
        if self.size is SMALLEST:
            config |= {"hidden_size": 240, "num_attention_heads": 2, "num_kv_heads": 1}
        with torch.device("meta"):
            model = Transformer(config)
        randomize(model, self.device)
        width, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
        generator = torch.Generator(self.device).manual_seed(2)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(torch.bfloat16)

        def rotary(tokens: int) -> torch.Tensor:
            angles = torch.rand(tokens, head // 2, generator=generator, device=self.device)
            return torch.polar(torch.ones_like(angles), angles)

        image, text, now = noise(1, self.size.tokens, width), noise(1, TEXT_TOKENS, width), noise(1, min(width, 1024))
        around_text, around_image = rotary(TEXT_TOKENS), rotary(self.size.tokens)
        around_all = torch.cat([around_text, around_image])

        @torch.inference_mode()
        def run() -> torch.Tensor:
            x = image
            for _ in range(self.size.steps * PREDICTIONS):
                words, refined = text, x
                for block in model.context_refiner:
                    words = block(words, around_text)
                for block in model.noise_refiner:
                    refined = block(refined, around_image, now)
                joined = torch.cat([words, refined], dim=1)
                for block in model.layers:
                    joined = block(joined, around_all, now)
                x = nn.functional.layer_norm(joined[:, TEXT_TOKENS:], (width,))
            return x

        return self._compare(f"{self.size.steps} steps, {self.size.tokens} tokens", model, run)

    def text(self) -> list[Row]:
        """A language model of the size of OmniGen2's, generating tokens at batch 1: each reads all weights."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.size.vocabulary,
            hidden_size=self.size.width,
            intermediate_size=self.size.width * 43 // 8,
            num_hidden_layers=self.size.layers * 9 // 8,
            num_attention_heads=16,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            model: Any = Qwen2ForCausalLM(config)
        randomize(model, self.device)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(
            self.device
        )  # It has numbers that are not parameters.
        ids = torch.arange(16, device=self.device)[None]
        settings = {
            "max_new_tokens": self.size.generated,
            "min_new_tokens": self.size.generated,
            "do_sample": False,
            "pad_token_id": 0,
        }

        @torch.inference_mode()
        def run() -> torch.Tensor:
            found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            return found

        rows = self._compare(f"{self.size.generated} tokens generated", model, run)
        return [row | {"tokens_per_second": self.size.generated / row["seconds"]} for row in rows]


SECTIONS: Final = ("image", "text")
_COLUMNS: Final = {
    "what": Column("what"),
    "name": Column("weights"),
    "seconds": Column("s"),
    "of_bf16": Column("of BF16"),
    "differing": Column("values that differ", format=",.0f"),
    "tokens_per_second": Column("tokens per second"),
    "held_bytes": Column("model, GB", 1e-9, ".2f"),
    "peak_bytes": Column("peak, GB", 1e-9, ".2f"),
}
_REPORT: Final = report.Report(
    name="gpu-models",
    title="Models that run compressed",
    about=(__doc__ or "").split("\n\n")[1].replace("\n", " ").strip(),
    columns=_COLUMNS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time models in BF16 and compressed on a GPU.")
    parser.add_argument("--device", default="cuda", help="default: cuda; cpu only tries this program out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections")
    parser.add_argument("--steps", type=int, default=50, help="of an image (default: 50)")
    parser.add_argument("--smallest", action="store_true", help="the smallest models, to try the program out")
    parser.add_argument(
        "--out", type=Path, default=results.RESULTS, help="folder for the results (default: benchmarks/results)"
    )
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if exit_code := report.refused("gpu-omnigen2", device):
        return exit_code
    size = SMALLEST if chosen.smallest else Size(steps=chosen.steps)
    return report.run(_REPORT, lambda: Bench(device, size), chosen.only, device, chosen.out)


if __name__ == "__main__":
    sys.exit(main())
