"""The parts of a recording: hooks, counting of steps, snapshots, the files."""
