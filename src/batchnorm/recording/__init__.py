"""watch(): what gamma and beta do in any training run, from the sums that the layers compute anyway.

watch       the Run that is being recorded
_recorder   attach     where the numbers come from: a tap on every layer, and one step's numbers as arrays
            observed   torch.nn's layers, which get a class that reports to the tap
            steps      what a step is, and when one ends
            writer     the folder, and the tables written into it now and then
            probe      on demand, on one batch: what only the activations show; the covariate shift of Santurkar et al.
"""
