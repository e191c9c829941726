"""CUDA sources on the processor: a header that stands in for CUDA, a driver around it, and its Python side."""
