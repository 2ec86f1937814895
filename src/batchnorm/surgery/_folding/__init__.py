"""How `fold` finds, computes and checks pairs of a batch norm and a convolution or linear layer."""
