"""The CPU kernels: loops that LLVM compiles, run by PyTorch's own threads."""
