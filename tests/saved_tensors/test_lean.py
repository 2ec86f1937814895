"""lean: the same bits with less kept, the same errors, and out of the way where it cannot follow."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leaning import assert_equal_steps, equal, kept_bytes, share_saved, step
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels.aten import AtenKernel
from batchnorm.kernels.cpu.kernel import CpuKernel
from batchnorm.saved_tensors import _following, _norms, _recipes
from batchnorm.saved_tensors._following import Following

CHANNELS = 8


class Blocks(nn.Module):
    """Two residual blocks: in place, with padding, with a pooled scale."""

    def __init__(self, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, CHANNELS, 3, padding=1), norm(CHANNELS)
        self.conv2, self.norm2 = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False), norm(CHANNELS)
        self.conv3, self.norm3 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), norm(CHANNELS)
        self.conv4, self.norm4 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), norm(CHANNELS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        x = x + F.silu(self.norm2(self.conv2(F.pad(x, (1, 1, 1, 1)))))
        y = self.norm3(self.conv3(x))
        y += x
        y = F.relu6(y)
        y = self.norm4(self.conv4(y * y.mean((2, 3), keepdim=True)))
        return self.conv4(F.hardswish(y))


def inputs(size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size)


def hooks_and_modes() -> tuple[Any, int]:
    return torch._C._autograd._top_saved_tensors_default_hooks(True), torch._C._len_torch_function_stack()


NORMS = {
    "stock": nn.BatchNorm2d,
    "ours": bn.BatchNorm2d,
    "no affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "untracked": lambda channels: bn.BatchNorm2d(channels, track_running_stats=False),
    "sync": bn.SyncBatchNorm,
    "renorm": bn.BatchRenorm2d,
    "ghost": lambda channels: bn.GhostBatchNorm2d(channels, 2),
    "domains": lambda channels: bn.DomainBatchNorm2d(channels, 2),
    "accumulating": lambda channels: bn.BatchNorm2d(channels, accumulate=2),
    "double": nn.BatchNorm2d,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.usefixtures("kernel_route")
def test_losses_gradients_and_statistics_are_equal(norm: str, layout: torch.memory_format) -> None:
    network = Blocks(NORMS[norm]).to(memory_format=layout)  # type: ignore[call-overload]
    dtype = torch.float64 if norm == "double" else torch.float32
    if norm == "ghost":  # a concatenation of parts is not followed
        return
    assert_equal_steps(network.to(dtype), lambda: inputs().to(dtype, memory_format=layout), accumulate=2)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.usefixtures("kernel_route")
def test_after_convert_and_under_autocast(convert: bool) -> None:
    network = Blocks()
    if convert:
        bn.convert(network)
    record = assert_equal_steps(network, inputs, mode=lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(record.layers) >= 3  # a fused SiLU saves nothing


def test_the_copy_that_autocast_makes_is_remade() -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.norm(x)))  # x is float32, so the convolution converts

    mode = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_equal_steps(Widened(), inputs, mode=mode)
    assert share_saved(Widened(), inputs(32), mode) > 0.5


def test_an_operation_that_autocast_runs_in_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU none of the followed ones is: add one that is. It is not replayed in the type of its argument."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.avg_pool3d(self.norm(self.conv(x)), 2))

    monkeypatch.setitem(_following.REPLAYED, F.avg_pool3d, F.avg_pool3d)
    monkeypatch.setitem(_following._FOLLOWED, F.avg_pool3d, Following._follow)
    network = Pooled()
    other = copy.deepcopy(network)
    record = bn.lean(other)
    x = torch.randn(4, 3, 4, 4, 4)
    mode = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert equal(step(network, [x], mode), step(other, [x], mode))
    assert [layer.why for layer in record.skipped] == ["an operation after it converted its argument, as autocast does"]


def test_frozen_layers_are_remade_from_their_running_statistics() -> None:
    network = Blocks(bn.BatchNorm2d)
    network(inputs())
    bn.freeze(network, gamma=False, beta=False)
    record = assert_equal_steps(network, inputs)
    assert len(record.layers) == 4


def test_statistics_that_move_between_forward_and_backward_do_not_matter() -> None:
    """A training forward moves them without a new version: recipes of an eval forward have copies."""
    network = Blocks()
    network(inputs())
    other = copy.deepcopy(network)
    bn.lean(other)
    x, more = inputs(), inputs()
    found = []
    for each in (network, other):
        for norm in (each.norm1, each.norm2):  # the others' backward reads the statistics
            norm.eval()
        each.norm3.eval().weight.requires_grad_(False)
        loss = each(x).square().mean()
        each.norm3.train()
        each(more)
        loss.backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert equal(*found)


def test_less_is_kept() -> None:
    for network in (Blocks(), Blocks(bn.BatchNorm2d)):
        assert share_saved(network, inputs(16)) > 0.4


def test_the_record_counts_what_is_not_kept() -> None:
    network, x = Blocks(), inputs(16)
    before = kept_bytes(network, x)
    record = bn.lean(network)
    after = kept_bytes(network, x)
    assert record.bytes == sum(layer.bytes for layer in record.layers)
    assert record.bytes * 0.9 < before - after <= record.bytes
    assert [layer.name for layer in record.layers] == ["norm1", "norm2", "norm3", "norm4"]
    assert "MiB less kept" in str(record)
    assert "BatchNorm2d" in str(record)


def test_the_record_says_why_a_layer_is_kept() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.viewed, self.added = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            other = self.conv(x).flip(0)
            return self.unused(x) + self.viewed(x)[:, :1].square() + self.conv(self.added(x) + other)

    network = Kept()
    record = bn.lean(network)
    assert str(record) == "no forward yet"
    network(inputs())
    assert {each.name: each.why for each in record.skipped} == {
        "unused": _following.NOT_SAVED,
        "viewed": "a view of it is saved",
        "added": "what is added to it, or multiplied with it, is not kept otherwise",
    }
    assert "kept (a view of it is saved)" in str(record)


def test_without_batch_norm_nothing_happens() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    record = bn.lean(network)
    network(inputs()).sum().backward()
    assert record.bytes == 0
    assert not record.layers


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_each_layer_normalizes_once_in_a_backward(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    make = _recipes.Recipe._make
    monkeypatch.setattr(_recipes.Recipe, "_make", lambda self: (runs.append(self), make(self))[1])
    network = Blocks(norm)
    bn.lean(network)
    for _ in range(2):
        network(inputs()).sum().backward()
        assert len(runs) == len(set(map(id, runs)))
        assert len(runs) >= 4
        runs.clear()


def test_remade_tensors_are_freed_after_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    make = _recipes.Recipe._make

    def recorded(self: _recipes.Recipe) -> Tensor:
        tensor = make(self)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(_recipes.Recipe, "_make", recorded)
    network = Blocks()
    bn.lean(network)
    output = network(inputs())
    output.sum().backward(retain_graph=True)
    assert made
    assert not any(storage() for storage in made)
    made.clear()
    torch.autograd.grad(output.sum(), network.conv4.weight, retain_graph=True)  # not all readers are reached
    assert made
    assert not any(storage() for storage in made)


def test_nothing_is_kept_after_backward() -> None:
    """No reference cycle, with Python's collector off."""
    network = Blocks(bn.BatchNorm2d)
    bn.lean(network)
    inside: list[weakref.ref[Any]] = []
    for module in network.modules():
        module.register_forward_hook(lambda *given: inside.append(weakref.ref(given[2].untyped_storage())))
    gc.disable()
    try:
        loss = network(inputs()).sum()
        loss.backward()
        del loss
        assert len(inside) > 5
        assert not any(storage() for storage in inside)
    finally:
        gc.enable()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_backward_frees_layer_by_layer(norm: Any) -> None:
    """What the last layers needed is free when the first ones run, as without lean."""
    first, second, norm1 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, CHANNELS, 1), norm(CHANNELS)

    class Shared(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(norm1(second(first(x))))
            return y.square() + y.exp() * y

    network = Shared(first, second, norm1)
    bn.lean(network)
    late: list[weakref.ref[Any]] = []
    second.register_forward_hook(lambda *given: late.append(weakref.ref(given[2].untyped_storage())))
    alive: list[bool] = []
    x = inputs().requires_grad_()
    loss = network(x).sum()
    assert any(storage() is not None for storage in late)
    x.register_hook(lambda _: alive.extend(storage() is not None for storage in late))
    loss.backward()
    assert alive
    assert not any(alive)


def test_several_forwards_before_the_backwards() -> None:
    network = Blocks()
    other = copy.deepcopy(network)
    bn.lean(other)
    batches = [inputs() for _ in range(3)]
    found = []
    for each in (network, other):
        losses = [each(batch).square().mean() for batch in batches]
        for loss in (losses[1], losses[0], losses[2]):
            loss.backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert equal(*found)


def test_backward_twice_and_in_parts() -> None:
    network = Blocks()
    other = copy.deepcopy(network)
    bn.lean(other)
    x = inputs()
    found = []
    for each in (network, other):
        loss = each(x).square().mean()
        parts = [torch.autograd.grad(loss, part, retain_graph=True)[0] for part in reversed(list(each.parameters()))]
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([*parts, *(parameter.grad for parameter in each.parameters())])
    assert equal(*found)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
@pytest.mark.usefixtures("kernel_route")
def test_double_backward(norm: Any) -> None:
    network = Blocks(norm).double()
    other = copy.deepcopy(network)
    record = bn.lean(other)
    x = inputs().double().requires_grad_()
    found = []
    for each in (network, other):
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append([gradient, *(parameter.grad for parameter in each.parameters())])
    assert record.bytes > 0
    assert equal(*found)


def test_two_threads_train_two_networks() -> None:
    networks = [Blocks(bn.BatchNorm2d) for _ in range(2)]
    others = copy.deepcopy(networks)
    batches = [inputs() for _ in range(4)]
    expected = [step(network, batches) for network in networks]
    found: dict[int, list[Tensor | None]] = {}

    def train(number: int) -> None:
        bn.lean(others[number])
        found[number] = step(others[number], batches)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(expected[number], found[number]) for number in range(2))


# --- errors


class Changed(nn.Module):
    """Changes a tensor in place that backward needs."""

    def __init__(self, norm: Any, which: str) -> None:
        super().__init__()
        self.conv, self.norm, self.which = nn.Conv2d(3, 4, 1), norm(4), which

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = torch.relu(self.norm(x))
        z = self.norm(y)
        if self.which == "x":
            x.detach().mul_(2)
        if self.which == "weight":
            with torch.no_grad():
                self.norm.weight.mul_(2)
        return z


@pytest.mark.parametrize("which", ["x", "weight"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
@pytest.mark.usefixtures("kernel_route")
def test_a_changed_tensor_raises_pytorchs_error(norm: Any, which: str) -> None:
    network, other = Changed(norm, which), Changed(norm, which)  # parameters of a copy have other versions
    bn.lean(other)
    errors = []
    for each in (network, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            each(inputs()).sum().backward()
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_the_hint_of_anomaly_detection_is_pytorchs() -> None:
    network = Changed(nn.BatchNorm2d, "x")
    other = copy.deepcopy(network)
    bn.lean(other)
    errors = []
    with pytest.warns(UserWarning, match="nomaly|Error detected"), torch.autograd.detect_anomaly():
        for each in (network, other):
            with pytest.raises(RuntimeError) as raised:
                each(inputs()).sum().backward()
            errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_forward_that_raises_leaves_no_hooks() -> None:
    class Broken(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("broken")

    before = hooks_and_modes()
    network = Broken()
    bn.lean(network)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            network(inputs())
        assert hooks_and_modes() == before
    network.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        network(inputs())
    assert hooks_and_modes() == before


def test_a_kernel_with_other_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not make the same bits again is kept, and the record says so."""
    monkeypatch.setattr(_norms, "_found", {})
    for kernel in (AtenKernel, CpuKernel):
        normalize = kernel.normalize
        wrong = lambda self, *given, by=normalize: by(self, *given) * (1 + 1e-6)  # noqa: E731
        monkeypatch.setattr(kernel, "normalize", wrong)
    network = Blocks(lambda channels: bn.BatchNorm2d(channels, act="tanh"))
    other = copy.deepcopy(network)
    record = bn.lean(other)
    x = torch.randn(8, 3, 64, 64)  # large enough for a kernel
    assert equal(step(network, [x]), step(other, [x]))
    assert {each.why for each in record.skipped} <= {"its output cannot be computed again with the same bits"}
    assert record.skipped


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lean takes a torch\.nn\.Module, got list"):
        bn.lean([])  # type: ignore[arg-type]


# --- on and off


def test_on_for_a_while_and_off() -> None:
    network, x = Blocks(), inputs(16)
    plain = kept_bytes(network, x)
    state = list(network.state_dict())
    with bn.lean(network) as record:
        assert record.active
        assert bn.lean(network) is record
        assert kept_bytes(network, x) < plain
        assert list(network.state_dict()) == state
    assert not record.active
    assert kept_bytes(network, x) == plain
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    record.close()
    assert bn.lean(network) is not record


def test_copies_and_pickles_have_records_of_themselves() -> None:
    network = Blocks()
    record = bn.lean(network)
    network(inputs())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        copied = bn.lean(other)
        assert copied is not record
        other(inputs(16))
        assert copied.bytes > record.bytes
        copied.close()
        assert not other._forward_hooks
        assert network._forward_hooks


def test_wrappers_are_looked_through() -> None:
    network = Blocks()
    record = bn.lean(nn.DataParallel(network))
    assert bn.lean(network) is record


def test_without_gradients_nothing_is_followed() -> None:
    network = Blocks()
    record = bn.lean(network)
    with torch.no_grad():
        network(inputs())
    with torch.inference_mode():
        network(inputs())
    assert str(record) == "no forward yet"


# --- where it steps aside


def test_other_hooks_are_left_alone() -> None:
    network = Blocks()
    other = copy.deepcopy(network)
    record = bn.lean(other)
    x = inputs()
    with torch.autograd.graph.save_on_cpu():
        found = step(other, [x])
    assert "other saved-tensor hooks are active" in str(record.aside)
    assert "nothing saved" in str(record)
    assert equal(step(network, [x]), found)
    other(x)
    assert record.aside is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_model(reentrant: bool) -> None:
    network = Blocks()
    other = copy.deepcopy(network)
    bn.lean(other)
    x = inputs().requires_grad_()
    found = []
    for each in (network, other):
        checkpoint(each, x, use_reentrant=reentrant).square().mean().backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert equal(*found)


def test_a_checkpoint_inside_is_left_alone() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                nn.Conv2d(3, 3, 1),
                nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)),
            )
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.second, self.first(x), use_reentrant=False)
            return self.first(self.norm(x))

    record = assert_equal_steps(Inside(), inputs)
    assert [layer.name for layer in record.layers] == ["norm"]
    assert not record.skipped


def test_torch_func() -> None:
    network = Blocks()
    record = bn.lean(network)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    x = inputs()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(network), parameters, (x,)).square().mean()

    def followed(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network.eval(), parameters, (x,)).square().mean()

    torch.func.grad(loss)(parameters)
    torch.func.grad(followed)(parameters)
    assert "torch.func" in str(record.aside)


def test_traces() -> None:
    network = Blocks().eval()
    record = bn.lean(network)
    x = inputs()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        traced = torch.jit.trace(network, x)
    assert "a trace" in str(record.aside)
    assert torch.equal(traced(x), network(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(network))
    assert torch.equal(graph(x), network(x))


def test_a_dispatch_mode() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Blocks()
    record = bn.lean(network)
    with FlopCounterMode(display=False):
        network(inputs())
    assert "TorchDispatchMode" in str(record.aside)


def test_one_lean_inside_another() -> None:
    network = nn.Sequential(Blocks(), nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 2, 1))
    inner = bn.lean(network[0])
    record = assert_equal_steps(network, inputs)
    assert len(record.layers) == 5
    assert inner.bytes > 0  # of the plain copy; its copy in the other network followed nothing
    assert bn.lean(network[0]) is inner


class Around(nn.Module):
    """A norm, something that the test puts in, and a convolution that saves the result."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.conv, self.between = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.between(self.norm(x * 1)))


def _by_data(y: Tensor) -> Tensor:
    y.data.clamp_(min=0)
    return y


def _by_numpy(y: Tensor) -> Tensor:
    y.detach().numpy()[:] *= 2
    return y


def _by_view(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("change", [_by_data, _by_numpy, _by_view])
def test_memory_that_is_changed_behind_autograd(change: Callable[[Tensor], Tensor]) -> None:
    network = Around(change)
    other = copy.deepcopy(network)
    record = bn.lean(other)
    x = inputs().requires_grad_()
    found = []
    for each in (network, other):
        each(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in each.parameters())])
        x.grad = None
    assert equal(*found)
    assert not record.layers


def test_an_addend_from_inference_mode() -> None:
    with torch.inference_mode():
        constant = torch.randn(4, 3, 8, 8)
    network = Around(lambda y: y + constant)
    bn.lean(network)
    network(inputs()).sum().backward()


def test_a_small_addend_is_kept_with_the_recipe() -> None:
    position = torch.randn(1, 3, 1, 1)
    record = assert_equal_steps(Around(lambda y: F.relu(y + position)), inputs)
    assert [layer.name for layer in record.layers] == ["norm"]


def test_meta_tensors() -> None:
    network = Blocks().to("meta")
    bn.lean(network)
    network(torch.randn(2, 3, 8, 8, device="meta")).sum().backward()


def test_compiled_networks_keep_everything() -> None:
    for order in ("lean first", "compile first"):
        network = Blocks()
        other = copy.deepcopy(network)
        if order == "lean first":
            bn.lean(other)
            compiled = torch.compile(other, backend="aot_eager", fullgraph=order == "compile first")
        else:
            compiled = torch.compile(other, backend="aot_eager")
            bn.lean(compiled)
        x = inputs()
        found, expected = step(compiled, [x]), step(network, [x])
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            torch.testing.assert_close(a, b)
        assert hooks_and_modes() == (None, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler, without lean, too
def test_a_compiled_function_inside() -> None:
    compiled = torch.compile(lambda y: y.relu() * 2, backend="aot_eager")
    network = nn.Sequential(Around(F.relu), nn.Conv2d(2, 3, 1), Around(compiled))
    record = assert_equal_steps(network, inputs, steps=2)
    assert "0.norm" in [layer.name for layer in record.layers]
