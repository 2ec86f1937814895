"""What is wrong with a batch norm layer, and what to do: rules over what is known of it.

checkup      check() and explain(): all rules over a model, a state dict or a checkpoint
network      where its layers come from; layers finds them by the names of their tensors
readers      the tensors that lie in a file, one file a format
observed     one layer, at one moment or over the steps of a training; what a finding is
rules        what its parameters, statistics and settings tell: of a training and of a checkpoint
at_rest      what they tell of a layer that is kept: in a model, a state dict or a file
across       what only the layers of a network together tell
training     what only the steps of a training tell
explanation  what gamma and beta do in each layer, from the running statistics: a table
words        findings in lines of text

Nothing here imports torch, and nothing knows a page.
"""
