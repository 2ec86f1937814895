"""From a watched training to what people read: pages, the terminal, a notebook.

reading    a Run -> what is said of each layer: curves over time, the units at the end, findings
answer     readings -> "do gamma and beta undo batch normalization?", in words
page       readings of one or several Runs -> the page as data
html       the page -> one self-contained file; follow renders it again while training goes on
terminal   `batchnorm show`;  card, what a notebook shows

Nothing here imports torch.
"""
