"""A call recorded once as a CUDA graph and replayed: what the GPU does, without what the host does to ask for it.

In a training step that keeps the GPU busy the host is ahead and its work costs nothing; in a benchmark of single calls
it would be all that is seen of small ones.
"""

from __future__ import annotations

import torch

from batchnorm.bench.contenders import Contender

WARM = 3
"""Calls before the recording: kernels are compiled and memory is had by then."""


class Replayed:
    """A contender's forward and, in training, its backward, as one graph. Autograd is in the mode of the caller."""

    apart = False

    def __init__(self, contender: Contender, train: bool) -> None:
        def call() -> None:
            y = contender.forward()
            if train:
                contender.backward(y)

        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            call()

    def forward(self) -> None:
        self.graph.replay()

    def backward(self, y: None) -> None:
        return None
