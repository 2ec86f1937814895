"""What forward keeps for backward: how much it is, and keeping less of it."""
