"""Random layers on random input against the definition in float64: forward, gradients, running statistics, by-products.

Both routes: PyTorch's operators differentiated by PyTorch, and the kernel's own forward and backward, which a tap asks
for. `accuracy` says how close is close enough.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import batchnorm as bn
from accuracy import ACTIVATIONS, Case, Outputs, assert_accurate, gradients, leaves
from batchnorm.kernels.contract import Tap

pytestmark = pytest.mark.usefixtures("kernel_route")

LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
STRIDES = ["contiguous", "channels_last", "sliced", "expanded", "transposed", "flipped storage"]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

shapes = st.integers(2, 5).flatmap(
    lambda dims: st.tuples(st.integers(1, 7), st.integers(1, 9), *[st.integers(1, 6)] * (dims - 2))
)


def strided(values: Tensor, how: str) -> Tensor:
    """The same values, laid out in memory another way."""
    if how == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":
        wide = torch.full([2 * n + 1 for n in values.shape], float("nan"), dtype=values.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if how == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "flipped storage":
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    return values.contiguous()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, torch.nn.Module]:
    """A layer, and a call of it."""
    shape = draw(shapes.filter(lambda s: s[0] * (torch.Size(s[2:]).numel()) > 1))
    dtype = draw(st.sampled_from(TYPES))
    how = draw(st.sampled_from(STRIDES))
    seed = draw(st.integers(0, 2**31 - 1))
    offset = draw(st.sampled_from([0.0, 1.0, -30.0, 1e3, -1e4]))
    scale = draw(st.sampled_from([1.0, 1e-2, 50.0]))
    with_residual = draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    farthest = 0.9 * torch.finfo(dtype).max

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    c = shape[1]
    columns = 1, c, *[1] * (len(shape) - 2)
    x = random(*shape)
    if how == "expanded" and len(shape) > 2:
        x = x[..., :1].expand(shape) if shape[0] * torch.Size(shape[2:-1]).numel() > 1 else x
        x = (x * scale + offset * scale * random(*columns)).clamp(-farthest, farthest).to(dtype)[..., :1].expand(shape)
    else:
        x = strided((x * scale + offset * scale * random(*columns)).clamp(-farthest, farthest).to(dtype), how)
    gradient_layout = draw(st.sampled_from(STRIDES[:3]))
    layer = LAYERS[len(shape)](
        c,
        eps=draw(st.sampled_from([1e-5, 1e-3, 1e-8, 0.7])),
        momentum=draw(st.sampled_from([0.1, None, 0.0, 1.0, 0.37])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
        dtype=torch.float32 if dtype.itemsize == 2 and draw(st.booleans()) else dtype,
        bias=draw(st.booleans()),
        act=draw(st.sampled_from(list(ACTIVATIONS))),
        negative_slope=draw(st.sampled_from([0.01, 0.3])),
    ).train(draw(st.booleans()))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(c))
        if layer.track_running_stats:
            layer.running_mean.copy_(random(c) + offset)
            layer.running_var.copy_(random(c).square() + 0.1)
            layer.num_batches_tracked.fill_(draw(st.sampled_from([0, 1, 4])))
    training = layer.training or not layer.track_running_stats
    averaged = None if layer.momentum is not None else 1.0 / (int(layer.num_batches_tracked or 0) + 1)
    tracked = layer.track_running_stats
    case = Case(
        x=x,
        grad_y=strided(random(*shape).to(dtype), gradient_layout),
        gamma=layer.weight,
        beta=layer.bias,
        residual=strided(random(*shape).to(dtype), how) if with_residual else None,
        running_mean=layer.running_mean.clone() if tracked else None,
        running_var=layer.running_var.clone() if tracked else None,
        training=training,
        momentum=layer.momentum if averaged is None else averaged,
        eps=layer.eps,
        act=layer.act,
        slope=layer.negative_slope,
    )
    note(f"{layer} {layer.training=} {seed=} {how} {dtype}")
    return case.away_from_kinks(), layer


def run(case: Case, layer: torch.nn.Module) -> Outputs:
    """y, the gradients and the running statistics after one call."""
    x, _, _, residual = leaves(case)
    y = layer(x, residual)
    known = gradients(y, case, x, layer.weight, layer.bias, residual)
    return {**known, "running_mean": layer.running_mean, "running_var": layer.running_var}


@settings(max_examples=200)
@given(cases())
def test_layers_are_as_accurate_as_pytorchs(drawn: tuple[Case, torch.nn.Module]) -> None:
    case, layer = drawn
    assert_accurate(run(case, layer), case, note=layer)


@pytest.mark.slow
@settings(max_examples=200)
@given(cases())
def test_the_kernels_own_backward_is_as_accurate_as_pytorchs(drawn: tuple[Case, torch.nn.Module]) -> None:
    case, layer = drawn
    layer._tap = tap = Tap()
    assert_accurate(run(case, layer), case, note=layer)
    if layer.training:  # in eval by the batch's own statistics, a forward is no training step
        (passed,) = tap.passes
        (sums,) = passed.grads
        found = {"mean": passed.mean, "var": passed.var, **sums._asdict()}
        assert passed.count == case.x.numel() // case.x.shape[1]
        assert_accurate(found, case, note=f"tap of {layer}")
        assert not any(vector.requires_grad for vector in found.values())
    else:
        assert tap.passes == [], "inference leaves no by-products"


@settings(max_examples=40)
@given(cases())
def test_both_routes_and_torch_nn_count_batches_alike(drawn: tuple[Case, torch.nn.Module]) -> None:
    case, layer = drawn
    kind = {bn.BatchNorm1d: torch.nn.BatchNorm1d, bn.BatchNorm2d: torch.nn.BatchNorm2d}
    theirs = kind.get(type(layer), torch.nn.BatchNorm3d)(
        layer.num_features, track_running_stats=layer.track_running_stats, affine=False, dtype=case.x.dtype
    )
    theirs.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("weight", "bias")})
    theirs.train(layer.training)
    for _ in range(2):
        layer(case.x, case.residual)
        theirs(case.x)
    layer._tap = Tap()
    layer(case.x, case.residual)
    theirs(case.x)
    assert theirs.num_batches_tracked == layer.num_batches_tracked
