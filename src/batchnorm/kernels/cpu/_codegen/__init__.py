"""The loops that Numba compiles, and the grammar of their names.

job                     the address of a `plan.Job`; FIELD.name is the place of a field in it
x, grad_y, y, dx        arrays: typed addresses of tensors in memory
line, line_dresidual    buffers of one run in the type that is computed in, rounded and stored afterwards
row, column, channel, cell, part    indices; `first_` and `end_` bound a range, the end excluded
rows, columns, cells    how many there are
offset                  the index of a value in a tensor
mean, rstd, scale       values; xmu = x - mean
constants, partials     arrays of several values per cell: value k of a cell is at k·cells + cell
MEAN, SCALE, TILE       constants that are compiled in, in capitals
"""
