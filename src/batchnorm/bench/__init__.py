"""`batchnorm bench`: time the layers against PyTorch, JAX and the memory bandwidth.

`conduct` runs it. tools/ in the checkout has the checks that need a GPU, and compiles the GPU kernels without one.
"""
