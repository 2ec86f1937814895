"""Used by several tools: finding layers, calling a model, measuring."""
