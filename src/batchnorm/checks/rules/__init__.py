"""Rules for checkpoints and for trainings; rules for both are in `findings`."""
