"""watch(): what gamma and beta do in any training run, from the sums that the layers compute anyway.

attach     where the numbers come from: a tap on every layer
observe    the same numbers for torch.nn's own layers
steps      what a step is, and when one ends
snapshot   one step's numbers, of all layers, as arrays
writer     onto the disk now and then, whatever happens there
recorder   all of it together: the Run that is being recorded
probe      on demand, on one held batch: what only the activations can tell
shift      the covariate shift of Santurkar et al.
"""
