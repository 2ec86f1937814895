"""Changes to whole models, one file a function: each says what it did, and changes all of the model or nothing.

convert, to_torch, to_group_norm    other layers in the place of batch norms
recalibrate, compare, undo          statistics measured on data (measure, batches, keep)
fold                                into the weights beside (pairs finds them, folding computes)
freeze, param_groups, conventions   fine-tuning, optimizers, other frameworks
norms                               which layers are worked on, and which are left alone
"""
