"""Batch norms that see a batch otherwise: spread over processes, corrected, cut into virtual batches, by domain.

synced    SyncBatchNorm: the batches of several processes as one
renorm    BatchRenorm: what a small batch gets wrong, corrected by the running statistics
ghost     GhostBatchNorm: statistics of virtual batches
domains   DomainBatchNorm: statistics for each kind of data, gamma and beta shared
"""
