"""The demo and the benchmarks; what the GPU programs share with them. Nothing of it is part of the package."""
