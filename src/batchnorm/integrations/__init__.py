"""Thin adapters to what people train with; each needs its own package, as an extra: batchnorm[lightning]."""
