"""What several tools use: finding layers, calling a model, measuring, changing all or nothing."""
