"""Changes to whole models that keep what they compute."""
