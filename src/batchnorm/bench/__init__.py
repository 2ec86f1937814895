"""`batchnorm bench`: how fast the layers are, beside what PyTorch and JAX do and beside what memory allows.

cases       which calls are timed          traffic     how many copies of memory each cannot do without
contenders  who is timed                   timing      interleaved rounds, quartiles, ratios round by round
criterion   what counts as right           gate        no speed without it
models      whole training steps           record      the stored result
conduct     all of it in order             table       the result in a terminal and in Markdown
allocator   one policy for both sides      device      the CPU, or a GPU and its clock
gpu_cases   cases of a GPU's size          gpu_compile what the GPU kernels compile to
gpu         all that needs a GPU
"""
