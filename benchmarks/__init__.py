"""The demo and the benchmarks, and what they share with the GPU programs. None of it is part of the package."""
