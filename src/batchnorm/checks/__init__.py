"""What is wrong with a batch norm layer, and what to do: rules over what is known of it.

check        check() and explain(): all rules over a model, a state dict or a checkpoint
sources      where the layers come from; layers finds them by the names of their tensors
readers      the tensors in a file, one file per format
findings     one layer, at one moment or over the steps of a training; what a finding is, and its lines of text
rules        state: parameters, statistics and settings, of a training and of a checkpoint; at_rest: a layer in a model,
             a state dict or a file; network: all layers together; training: the steps of a training
explain      what gamma and beta do in each layer, from the running statistics: a table

Nothing here imports torch, and nothing knows a page.
"""
