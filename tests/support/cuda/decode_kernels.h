// The kernels of runtime/kernels/decode.cu that can be launched.
CUDA_ON_CPU_KERNEL(df11_decode)
CUDA_ON_CPU_KERNEL(df11_decode_small)
CUDA_ON_CPU_KERNEL(df11_gather_rows)
