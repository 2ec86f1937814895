"""`batchnorm bench`: how fast the layers are, beside what PyTorch and JAX do and beside what memory allows.

cases       which calls are timed          contenders  who is timed
timing      interleaved rounds, quartiles, ratios round by round; the device and its clock
models      whole training steps, and inference
conduct     all of it in order; no speed without correctness; the floor in copies of memory
record      the stored result, and one allocation policy for both sides
table       the result in a terminal and in Markdown

tools/ in the checkout has what only a GPU can run, and what the GPU kernels compile to.
"""
