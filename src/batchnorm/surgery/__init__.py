"""Changes to whole models, one file a function: each says what it did, and changes all of the model or nothing.

convert, to_torch, to_group_norm, sync, keep_domain    other layers in the place of batch norms
recalibrate, compare, undo, pool_statistics            running statistics, measured on data or pooled
adapt                                                  statistics that follow a batch, for a while
fold                                                   into the weights of the maps before or after
to_onednn                                              convolution and activation as one primitive, on the CPU
freeze, param_groups, conventions                      fine-tuning, optimizers, other frameworks

_shared has what they have in common: which layers a tool works on, how it calls a model, how a change is taken back.
_fusing is how `convert` joins an activation and an addition to a layer, _folding how `fold` and `to_onednn` find and
try pairs.
"""
