"""watch(): record what gamma and beta do in any training run, from sums that the layers compute anyway.

watch       the Run while it is recorded
steps       schedules; when a step ends
_recorder   attach     taps on the layers, and the columns of one step
            observed   subclasses of torch.nn's layers that report to a tap
            writer     the folder, and the tables written into it from time to time
            probe      measurements of activations on one batch; the covariate shift of Santurkar et al.
"""
