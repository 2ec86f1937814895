"""The page and the terminal output of what a check of a model or checkpoint found."""
