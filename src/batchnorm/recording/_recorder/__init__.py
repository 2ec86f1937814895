"""The parts of a recording: taps, snapshots, probes and files."""
