"""Benchmarks and checks of the CUDA kernels."""
