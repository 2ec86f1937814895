"""The rules of `check` on layers at rest and on a training; those on what a layer holds are in `findings`."""
