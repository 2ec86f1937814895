"""Adapters to other libraries; each needs an extra, such as batchnorm[lightning]."""
