"""Sums of products for each sample and channel, against float64."""

import pytest
import torch

from batchnorm.kernels.cpu import products
from randomness import SEED

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [(2, 3, 40), (1, 1, 17), (4, 17, 9, 9), (1, 96, 56, 56), (16, 40, 14, 14), (3, 33, 4, 5, 6), (5, 130, 7, 7)]


def laid_out(x, channels_last):
    return x.to(memory_format=LAYOUTS[x.dim()]) if channels_last else x


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_products_agree_with_float64(shape, dtype, channels_last, threads):
    if channels_last and len(shape) == 3:
        pytest.skip("no such layout")
    generator = torch.Generator().manual_seed(SEED)
    a, b = (
        laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), channels_last)
        for _ in range(2)
    )
    assert products.why_unsupported(a) is None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums = products.sums_of_products(a, b)
    finally:
        torch.set_num_threads(before)
    expected = (a.double() * b.double()).flatten(2).sum(2)
    size = (a.double() * b.double()).abs().flatten(2).sum(2)
    assert sums.dtype is torch.float64
    assert sums.shape == shape[:2]
    assert ((sums - expected).abs() <= (1e-14 if dtype is torch.float64 else 1e-6) * size).all()


def test_what_cannot_be_summed_has_a_reason():
    assert products.why_unsupported(torch.randn(3, 4)) == "short slices"
    assert products.why_unsupported(torch.randn(3, 4, 3, 3)) == "short slices"
    assert "not torch.int32" in str(products.why_unsupported(torch.randn(3, 4, 5, 6).int()))
    assert "neither contiguous nor" in str(products.why_unsupported(torch.randn(3, 4, 40).mT.contiguous().mT))
    assert "device 'meta'" in str(products.why_unsupported(torch.empty(3, 4, 40, device="meta")))
