"""The page and the terminal output of a diff."""
