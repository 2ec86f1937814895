"""What a study of regimes says: which of them is worth it, and where."""
