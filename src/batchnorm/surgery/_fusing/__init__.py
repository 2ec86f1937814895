"""How `convert` fuses activations and additions in a model's methods into its batch norm layers."""
