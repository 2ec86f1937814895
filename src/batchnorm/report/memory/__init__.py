"""The memory of training steps, as `batchnorm bench --memory` measures it."""
