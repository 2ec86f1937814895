"""PyTorch's own sample inputs for batch norm, run on ours: its module tests' and its operator tests'.

The samples come from torch.testing._internal (common_modules, common_methods_invocations), with our classes in place of
torch.nn's; the properties checked are those of its test_modules.py and test_ops*.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch's test helpers import is old in places, and not ours to mend
    from torch.testing._internal import common_methods_invocations, common_modules

# Forward-mode differentiation compiles PyTorch's own decompositions with torch.jit.script, which PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")

KINDS = {
    torch.nn.BatchNorm1d: bn.BatchNorm1d,
    torch.nn.BatchNorm2d: bn.BatchNorm2d,
    torch.nn.BatchNorm3d: bn.BatchNorm3d,
}
LAZY = {
    torch.nn.BatchNorm1d: (torch.nn.LazyBatchNorm1d, bn.LazyBatchNorm1d),
    torch.nn.BatchNorm2d: (torch.nn.LazyBatchNorm2d, bn.LazyBatchNorm2d),
    torch.nn.BatchNorm3d: (torch.nn.LazyBatchNorm3d, bn.LazyBatchNorm3d),
}
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in KINDS}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
CLASSES = pytest.mark.parametrize("theirs", KINDS, ids=lambda cls: cls.__name__)


def samples(theirs: type, training: bool, dtype: torch.dtype = torch.float64, *, grad: bool = False) -> Iterator[tuple]:
    """(our layer, torch's layer, input) for each of PyTorch's module inputs, in the mode asked for."""
    inputs = INFOS[theirs].module_inputs_func(
        INFOS[theirs], device="cpu", dtype=dtype, requires_grad=grad, training=training
    )
    assert len(inputs) >= 7
    for sample in inputs:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        layers = [cls(*args, **kwargs, dtype=dtype).train(training) for cls in (KINDS[theirs], theirs)]
        if layers[1].weight is not None:
            torch.nn.init.uniform_(layers[1].weight)
        layers[0].load_state_dict(layers[1].state_dict())
        (x,) = sample.forward_input.args
        yield *layers, x


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, check_stride=True)


@CLASSES
def test_every_class_has_samples_and_error_samples(theirs: type) -> None:
    assert INFOS[theirs].module_error_inputs_func is not None
    assert INFOS[theirs].train_and_eval_differ


@MODES
@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_state_are_torchs_to_the_bit(theirs: type, training: bool, dtype: torch.dtype) -> None:
    for our, their, x in samples(theirs, training, dtype):
        for _ in range(3):
            same(our(x), their(x))
        assert our.state_dict().keys() == their.state_dict().keys()
        for key, value in their.state_dict().items():
            if their.momentum is None and key.startswith("running"):  # 1/n on the device instead of on the host
                torch.testing.assert_close(our.state_dict()[key], value)
            else:
                same(our.state_dict()[key], value)
        assert repr(our) == repr(their)


@MODES
@CLASSES
def test_gradients_are_torchs_for_contiguous_and_other_input(theirs: type, training: bool) -> None:
    for our, their, x in samples(theirs, training):
        for view in (x, torch.stack([x, x], -1)[..., 1], x.transpose(0, -1).contiguous().transpose(0, -1)):
            grads = []
            for layer in (our, their):
                leaf = view.detach().requires_grad_()
                y = layer(leaf)
                torch.manual_seed(1)
                grads.append(torch.autograd.grad(y, [leaf, *layer.parameters()], torch.randn_like(y)))
            for ours, others in zip(*grads, strict=True):
                same(ours, others)


@MODES
@CLASSES
def test_gradcheck_and_gradgradcheck(theirs: type, training: bool) -> None:
    for our, _, x in samples(theirs, training, grad=True):
        names, parameters = zip(*our.named_parameters(), strict=True) if list(our.parameters()) else ((), ())

        def call(x: Tensor, *values: Tensor, our=our, names=names) -> Tensor:
            state = {k: v.clone() for k, v in our.named_buffers()}
            return torch.func.functional_call(our, {**state, **dict(zip(names, values, strict=True))}, (x,))

        x = x.detach()[(..., *[slice(3)] * (x.dim() - 2))].requires_grad_()  # the samples' corner, for time
        assert gradcheck(call, (x, *parameters), check_forward_ad=x.numel() > 0, fast_mode=True)
        if x.numel() < 120:
            assert gradgradcheck(call, (x, *parameters), fast_mode=True)


@MODES
@CLASSES
def test_pickle_and_deepcopy_keep_the_layer(theirs: type, training: bool) -> None:
    for our, _, x in samples(theirs, training):
        our(x)
        stream = io.BytesIO()
        torch.save(our, stream)
        stream.seek(0)
        copies = [pickle.loads(pickle.dumps(our)), copy.deepcopy(our), torch.load(stream, weights_only=False)]
        y = our(x)
        for other in copies:
            assert type(other) is type(our)
            assert repr(other) == repr(our)
            same(other(x), y)
            same(other.state_dict(keep_vars=False)["weight"], our.weight.detach()) if our.affine else None


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_factory_arguments_reach_parameters_and_buffers(theirs: type, dtype: torch.dtype) -> None:
    for sample in INFOS[theirs].module_inputs_func(
        INFOS[theirs], device="cpu", dtype=dtype, requires_grad=False, training=True
    ):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        for device in ("cpu", "meta"):
            our = KINDS[theirs](*args, **kwargs, device=device, dtype=dtype)
            state = {**dict(our.named_parameters()), **dict(our.named_buffers())}
            assert all(value.device.type == device for value in state.values())
            assert {v.dtype for k, v in state.items() if k != "num_batches_tracked"} <= {dtype}
        skipped = torch.nn.utils.skip_init(KINDS[theirs], *args, **kwargs)
        assert all(value.device.type == "cpu" for value in skipped.state_dict().values())


@MODES
@CLASSES
def test_memory_formats_are_torchs(theirs: type, training: bool) -> None:
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    for our, their, x in samples(theirs, training):
        for memory_format in [torch.contiguous_format, *formats.get(x.dim(), [])]:
            for layer in (our, their):
                layer.to(memory_format=memory_format)
            same(our(x.contiguous(memory_format=memory_format)), their(x.contiguous(memory_format=memory_format)))


@CLASSES
def test_train_and_eval_differ(theirs: type) -> None:
    for our, _, x in samples(theirs, True):
        if x.numel():
            trained = our(x)
            differs = not torch.equal(our.eval()(x), trained)
            assert differs == our.track_running_stats


@MODES
@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lazy_layers_become_ours_and_equal_torchs(theirs: type, training: bool, dtype: torch.dtype) -> None:
    for our, _, x in samples(theirs, training, dtype):
        how = {"bias": our.bias is not None} if our.affine else {}
        arguments = our.eps, our.momentum, our.affine, our.track_running_stats
        lazy = [cls(*arguments, dtype=x.dtype, **how).train(training) for cls in reversed(LAZY[theirs])]
        assert repr(lazy[0]) == repr(lazy[1])
        stored = pickle.loads(pickle.dumps(lazy[0]))
        y = [layer(x) for layer in lazy]
        assert type(lazy[0]) is KINDS[theirs]
        assert repr(lazy[0]) == repr(lazy[1])
        same(*y)
        if x.dtype == torch.float32:  # PyTorch's uninitialized tensors forget their type when pickled
            same(stored(x), y[1])


@CLASSES
def test_error_inputs_raise_torchs_type_and_words(theirs: type) -> None:
    info = INFOS[theirs]
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert errors
    for error in errors:
        construct, call = error.module_error_input.constructor_input, error.module_error_input.forward_input
        assert error.error_on is common_modules.ModuleErrorEnum.FORWARD_ERROR
        layer = KINDS[theirs](*construct.args, **construct.kwargs, dtype=torch.float64)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*call.args, **call.kwargs)


OP = next(op for op in common_methods_invocations.op_db if op.name == "nn.functional.batch_norm")


def op_samples(dtype: torch.dtype = torch.float64, *, grad: bool = False) -> list:
    return list(OP.sample_inputs_func(OP, "cpu", dtype, grad))


def of(function: Callable, sample) -> Callable:
    """The call of a sample as a function of its differentiable tensors, on copies of the statistics."""
    mean, var, *_ = sample.args

    def call(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        statistics = [None if t is None else t.clone() for t in (mean, var)]
        return function(x, *statistics, weight, bias, **sample.kwargs)

    return call


def differentiable(sample) -> tuple:
    return tuple(t for t in (sample.input, *sample.args[2:]) if t is not None)


@pytest.mark.parametrize("dtype", sorted(OP.dtypes, key=str), ids=str)
def test_the_functional_equals_torchs_on_its_samples(dtype: torch.dtype) -> None:
    seen = op_samples(dtype)
    assert len(seen) >= 10
    for sample in seen:
        moved = []
        for function in (bn.functional.batch_norm, torch.nn.functional.batch_norm):
            mean, var = (None if t is None else t.clone() for t in sample.args[:2])
            try:
                y = function(sample.input, mean, var, *sample.args[2:], **sample.kwargs)
            except Exception as error:
                moved.append(type(error))
            else:
                moved.append([t for t in (y, mean, var) if t is not None])
        if isinstance(moved[1], type):
            assert issubclass(moved[0], moved[1])
        else:
            for ours, theirs in zip(*moved, strict=True):
                same(ours, theirs)


def test_the_functional_passes_gradcheck_gradgradcheck_and_forward_mode() -> None:
    assert OP.supports_forward_ad
    assert OP.supports_fwgrad_bwgrad
    for sample in op_samples(grad=True):
        if sample.input.dim() < 2:
            continue
        call, inputs = of(bn.functional.batch_norm, sample), differentiable(sample)
        assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
        if sample.input.numel() < 100:
            assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_vmap_grad_and_jvp_of_the_functional_are_torchs() -> None:
    for sample in op_samples():
        if sample.input.dim() < 2:
            continue
        inputs = differentiable(sample)
        tangents = tuple(torch.randn_like(t) for t in inputs)
        results = []
        for function in (bn.functional.batch_norm, torch.nn.functional.batch_norm):
            call = of(function, sample)
            y, jvp = torch.func.jvp(call, inputs, tangents)
            grad = torch.func.grad(lambda x, call=call, y=y, rest=inputs[1:]: (call(x, *rest) * y).sum())(inputs[0])
            known = [y, jvp, grad]
            if not sample.kwargs.get("training"):
                many = torch.stack([inputs[0], 2 * inputs[0]])
                known.append(torch.func.vmap(lambda x, call=call, rest=inputs[1:]: call(x, *rest))(many))
            results.append(known)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
