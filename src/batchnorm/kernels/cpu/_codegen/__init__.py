"""The loops that Numba compiles: one file per step of the transform."""
