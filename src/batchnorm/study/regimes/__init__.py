"""The study of regimes: small batches, batches not drawn at random, padded sequences; on the embedded digits."""
