"""How `convert` fuses an activation and an addition into a batch norm layer of a model's own code."""
