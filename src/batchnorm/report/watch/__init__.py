"""From a watched training to what people read.

numbers    a Run → what is said of each layer: curves over time, the units at the end, findings
answer     numbers → "do gamma and beta undo batch normalization?", in words
rows       both → tables of layers and of runs, and the summary of a run
page       summaries of one or several Runs → the page as data; payload, what its scripts read
terminal   `batchnorm show` and JSON;  card, what a notebook shows;  follow, a page that grows with its training
"""
