"""The rules of `check`, one file per subject."""
