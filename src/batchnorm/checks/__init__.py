"""Rules that find problems of batch norm layers and say what to do.

check        check() and explain(): all rules over a model, a state dict or a checkpoint
sources      read the layers of a model, a state dict or a file; layers finds them by the names of their tensors
readers      read the tensors of a file, one module per format
findings     the data of one layer, a finding and its text, and the rules that trainings and checkpoints share
rules        further rules. at_rest: for models, state dicts and files; training: for the steps of a training

Nothing here imports torch or the report.
"""
