"""Layers that see the batch otherwise in training: synchronized, renormalized, in ghost batches, per domain."""
