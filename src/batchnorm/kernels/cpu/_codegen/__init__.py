"""The loops that LLVM compiles, written with `builder` and `values`, and the grammar of their names.

job                     the address of a `plan.Job`; FIELD.name is the place of a field in it
x, grad_y, y, dx        arrays: typed addresses of tensors in memory
row, column, channel, cell, part    indices; `first_` and `end_` bound a range, the end excluded
rows, columns, cells    how many there are
offset                  the index of a value in a tensor; a `Place` is an offset, its row and a mask
mean, rstd, scale       values; xmu = x - mean
constants, partials     arrays of several values per cell: value k of a cell is at k·cells + cell
MEAN, SCALE, SHIFT      the constants of a cell, by their k

`tiles` has the frame: threads, steps, tiles, phases. `reductions` has the sums, `channels` the work per channel,
`results` the second pass, `activations` act(z) and its gradient.
"""
