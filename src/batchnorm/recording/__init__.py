"""watch(): what gamma and beta do in any training run, from the sums that the layers compute anyway.

watch       the Run that is being recorded
_recorder   attach     where the numbers come from: a tap on every layer, torch.nn's own included
            steps      what a step is, and when one ends
            snapshot   one step's numbers, of all layers, as arrays
            writer     the folder, and the tables written into it now and then
            probe      on demand, on one batch: what only the activations show; the covariate shift of Santurkar et al.
"""
