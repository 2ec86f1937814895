"""The page and the terminal output of the paper's study."""
