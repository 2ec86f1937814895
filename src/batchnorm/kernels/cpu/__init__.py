"""The CPU kernels: loops compiled by Numba, run by PyTorch's own threads."""
