"""The functions that Triton compiles, and the grammar of their names.

    x_ptr, mean_ptr             a pointer to a tensor; None where a launch has no such tensor
    x, mean, rstd, dgamma       values loaded or computed, float32 whatever the tensors are; xmu = x - mean
    offsets, mask               where the values of a tile lie in memory, one row per position, and which exist
    block                       (channel_ids, channel_mask): the channels of one program, and which exist
    strip                       (first_tile, end_tile, block, positions, channels, span): the tiles of one program
    sizes                       (positions, channels, span, parts, part_positions), as `gpu.plan` describes them
    part, part_ids              the program's share of a channel, and a tile of such indices
    partials_ptr                sums of each part, (sums, parts, C)
    TILE_VALUES, TILE_CHANNELS, TILE_PARTS, PITCH, ...    constants that are compiled in, in capitals

`store_` functions write to memory, `load_` functions read it, and `merge_` functions combine parts, always in the order
of the parts.
"""
