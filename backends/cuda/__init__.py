"""CUDA devices: kernels as blocks of threads, compiled to machine code of each architecture."""
