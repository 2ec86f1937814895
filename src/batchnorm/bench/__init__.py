"""`batchnorm bench`: time the layers against PyTorch, JAX and the memory bandwidth.

cases       which calls are timed          contenders  what is timed
timing      interleaved rounds, quartiles, ratios round by round; the device and its clock
models      whole training steps, and inference
conduct     the whole run; wrong results are not timed; the floor in copies of memory
record      the stored result, and one allocation policy for both sides
table       the result in a terminal and in Markdown

tools/ in the checkout has the checks that need a GPU, and compiles the GPU kernels without one.
"""
