"""What is wrong with a batch norm layer, and what to do: rules over what is known of it.

observed   one layer, at one moment or over the steps of a training; what a finding is
rules      what its parameters, statistics and settings tell: of a training and of a checkpoint
training   what only the steps of a training tell

Nothing here imports torch, and nothing knows a page.
"""
