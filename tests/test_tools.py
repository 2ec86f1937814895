"""PyTorch's own tools over our layers: the same as over torch.nn's, and none silently drops an activation."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrize, prune
from torch.optim import swa_utils

import batchnorm as bn
from batchnorm.layers import _NORM_ONLY_TOOLS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript, deprecated, is what these modules of PyTorch's are made of
    from torch.ao.quantization import fuse_modules, fuse_modules_qat
    from torch.fx.experimental import optimization
    from torch.utils import mkldnn

# PyTorch's own deprecations of what it still ships: TorchScript, and quantization that moved to torchao.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
]
COMPILER = shutil.which("g++") or shutil.which("clang++")
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ACTS = pytest.mark.parametrize("act", [None, "relu", "silu"])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A convolution, our layer with a residual, and another convolution."""

    def __init__(self, act: str | None = "relu", momentum: float | None = 0.1, cls: type = bn.BatchNorm2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.norm = cls(3, momentum=momentum) if act is None else cls(3, momentum=momentum, act=act)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x), x))


def chain(act: str | None, cls: type = bn.BatchNorm2d) -> nn.Sequential:
    """Convolution and batch norm with statistics that are not the initial ones, the same at every call."""
    torch.manual_seed(5)
    norm = cls(3) if act is None else cls(3, act=act)
    layers = nn.Sequential(nn.Conv2d(2, 3, 1), norm)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.uniform_(norm.bias, -1, 1)
    layers(torch.randn(8, 2, 4, 4) * 3 + 1)
    return layers


def images() -> Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))


# --- torch.compile, torch.export, torch.fx, torch.jit -----------------------------------------------------------------


@ACTS
@MODES
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph_with_the_same_numbers(
    backend: str, momentum: float | None, training: bool, act: str | None
) -> None:
    plain = Block(act, momentum).train(training)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size in (4, 4, 6):
        x = torch.randn(size, 3, 5, 5)
        y, other = compiled(x), plain(x)
        torch.testing.assert_close(y, other)
        y.sum().backward()
        other.sum().backward()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(COMPILER is None, reason="torch.compile's default backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@MODES
def test_compiles_with_the_default_backend(training: bool) -> None:
    plain = Block("relu").train(training)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(compiled(x), plain(x))


@ACTS
@MODES
def test_exports_and_the_program_gives_the_same_numbers(training: bool, act: str | None) -> None:
    model = Block(act).train(training)
    x = torch.randn(4, 3, 5, 5)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    other = torch.randn(7, 3, 5, 5)
    torch.testing.assert_close(program.module(check_guards=False)(other), model(other))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.onnx's own use of torch's pytree
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_the_exported_onnx_graph_has_the_activation() -> None:
    program = torch.onnx.export(chain("relu").eval(), (images(),), dynamo=True)
    assert "Relu" in {node.op_type for node in program.model.graph}


@ACTS
def test_a_traced_layer_stays_one_module_that_train_and_eval_reach(act: str | None) -> None:
    model = Block(act)
    traced = torch.fx.symbolic_trace(model)
    node = next(n for n in traced.graph.nodes if n.target == "norm")
    assert node.op == "call_module"
    assert len(node.all_input_nodes) == 2
    x = torch.randn(4, 3, 5, 5)
    traced.train()(x)
    assert traced.norm.num_batches_tracked == 1
    assert model.norm is traced.norm
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))
    assert traced.norm.num_batches_tracked == 1


def test_the_functional_is_one_node_of_a_traced_module() -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return bn.functional.batch_norm(x, None, None, training=True, residual=residual, act="relu")

    traced = torch.fx.symbolic_trace(Uses())
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [bn.functional.batch_norm]
    x = torch.randn(5, 3)
    torch.testing.assert_close(traced(x, -x), Uses()(x, -x))


@pytest.mark.parametrize("cls", [bn.BatchNorm2d, nn.BatchNorm2d])
def test_tracing_a_layer_by_itself_is_refused_as_torchs(cls: type) -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(cls(3))


@ACTS
def test_jit_script_is_refused_with_what_to_use_and_leaves_the_model_alone(act: str | None) -> None:
    model = chain(act)
    with pytest.raises(TypeError, match=r"torch\.jit\.script does not compile .*BatchNorm2d: use torch\.export"):
        torch.jit.script(model)
    assert any(type(layer) is bn.BatchNorm2d for layer in model)


@ACTS
def test_jit_trace_and_its_freezing_keep_the_activation(act: str | None) -> None:
    model = chain(act).eval()
    traced = torch.jit.trace(model, images())
    frozen = torch.jit.freeze(torch.jit.trace(model, images()))
    for version in (traced, frozen):
        torch.testing.assert_close(version(images()), model(images()))


# --- tools that rebuild layers: the same with act=None, refused with one -------------------------------------------


def same_as_over_torchs(tool: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = (tool(chain(None, cls).eval()) for cls in (bn.BatchNorm2d, nn.BatchNorm2d))
    torch.testing.assert_close(ours(images()), theirs(images()))


def to_mkldnn(model: nn.Module) -> Callable[[Tensor], Tensor]:
    converted = mkldnn.to_mkldnn(model)
    return lambda x: converted(x.to_mkldnn()).to_dense()


REBUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SyncBatchNorm.convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fuse_conv_bn_eval": lambda model: fusion.fuse_conv_bn_eval(model[0], model[1]),
    "torch.utils.mkldnn.to_mkldnn": to_mkldnn,
}


@pytest.mark.parametrize("name", REBUILDERS)
def test_rebuilding_tools_give_what_they_give_over_torchs(name: str) -> None:
    same_as_over_torchs(REBUILDERS[name])


@pytest.mark.parametrize("name", REBUILDERS)
def test_rebuilding_tools_refuse_to_drop_an_activation(name: str) -> None:
    instead = {"torch.utils.mkldnn.to_mkldnn": "act=None", "fuse_conv_bn_eval": "batchnorm.fold"}.get(
        name, "batchnorm.sync"
    )
    with pytest.raises(TypeError, match=f"{name} would drop the activation of this layer .act='relu'.*{instead}"):
        REBUILDERS[name](chain("relu").eval())


def test_linear_fusion_is_torchs_and_refuses_to_drop_an_activation() -> None:
    linear, x = nn.Linear(4, 3), torch.randn(5, 4)
    norm = bn.BatchNorm1d(3).eval()
    torch.testing.assert_close(fusion.fuse_linear_bn_eval(linear.eval(), norm)(x), norm(linear(x)))
    with pytest.raises(TypeError, match="fuse_linear_bn_eval would drop the activation"):
        fusion.fuse_linear_bn_eval(linear, bn.BatchNorm1d(3, act="silu").eval())


def test_every_listed_tool_still_exists_where_it_is_listed() -> None:
    warnings.simplefilter("ignore")
    for module, name in _NORM_ONLY_TOOLS:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_syncbatchnorm_conversion_is_refused_deep_inside_a_model() -> None:
    with pytest.raises(TypeError, match="convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Block("relu")))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(Block(None))
    assert type(converted.norm) is nn.SyncBatchNorm


# --- tools that match layers by class: each either keeps the activation or refuses ---------------------------------


def keeps(tool: Callable[[nn.Module], Callable[[Tensor], Tensor]], act: str, tolerance: float = 1e-5) -> None:
    model = chain(act).eval()
    changed = tool(copy.deepcopy(model))
    torch.testing.assert_close(changed(images()), model(images()), rtol=tolerance, atol=tolerance)


def quantized_fx(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping(), (images(),))
    prepared(images())
    return convert_fx(prepared)


def pruned(model: nn.Module) -> nn.Module:
    from torch.ao.pruning._experimental.pruner import SaliencyPruner

    pruner = SaliencyPruner({})
    pruner.prepare(model, [{"tensor_fqn": "0.weight", "sparsity_level": 0.0}])
    return pruner.prune()


KEEP = {"fx.experimental.optimization.fuse": (optimization.fuse, 1e-5), "quantize_fx": (quantized_fx, 0.2)}
REFUSE: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "fuse_modules": (lambda m: fuse_modules(m, ["0", "1"]), "did not find fuser method for: .*batchnorm.layers"),
    "fuse_modules_qat": (lambda m: fuse_modules_qat(m.train(), ["0", "1"]), "did not find fuser method"),
    "ao.pruning": (pruned, "still contains FakeStructuredSparsity"),
}
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@QUIET
@pytest.mark.parametrize("act", ["relu", "sigmoid"])
@pytest.mark.parametrize("name", KEEP)
def test_tools_that_match_by_class_and_find_none_of_theirs_keep_the_activation(name: str, act: str) -> None:
    keeps(KEEP[name][0], act, KEEP[name][1])


@QUIET
@pytest.mark.parametrize("name", REFUSE)
def test_tools_that_must_find_a_class_of_theirs_refuse(name: str) -> None:
    tool, words = REFUSE[name]
    with pytest.raises(Exception, match=words):
        tool(chain("relu").eval())


def test_the_check_for_dropped_activations_can_fail() -> None:
    with pytest.raises(AssertionError, match="not close"):
        keeps(lambda model: nn.Sequential(model[0], nn.Identity()), "relu")


@pytest.mark.skipif(COMPILER is None, reason="torch.compile's default backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("setting", ["efficient_conv_bn_eval_fx_passes", "freezing"])
def test_the_compilers_own_folding_keeps_the_activation(setting: str) -> None:
    model = chain("relu").eval()
    with torch._inductor.config.patch({setting: True}), torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(images()), model(images()), rtol=1e-4, atol=1e-5)


# --- tools that change layers in place -----------------------------------------------------------------------------


def test_replace_all_batch_norm_modules_turns_tracking_off_and_keeps_the_activation() -> None:
    known = []
    for cls in (bn.BatchNorm2d, nn.BatchNorm2d):
        model = torch.func.replace_all_batch_norm_modules_(chain(None, cls))
        assert model[1].running_mean is None
        known.append(torch.func.vmap(model)(torch.stack([images(), 2 * images()])))
    torch.testing.assert_close(*known)
    model = torch.func.replace_all_batch_norm_modules_(chain("relu"))
    assert (model(images()) >= 0).all()


def test_swa_averages_and_update_bn_recomputes_statistics_as_torchs() -> None:
    data = [images() + i for i in range(4)]
    known = []
    for cls in (bn.BatchNorm2d, nn.BatchNorm2d):
        averaged = swa_utils.AveragedModel(chain(None, cls))
        averaged.update_parameters(chain(None, cls))
        swa_utils.update_bn(data, averaged)
        known.append(averaged.state_dict())
    assert known[0].keys() == known[1].keys()
    for key, value in known[1].items():
        torch.testing.assert_close(known[0][key], value)


def test_parametrize_and_prune_change_gamma_as_torchs() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    known = []
    for cls in (bn.BatchNorm2d, nn.BatchNorm2d):
        model = chain(None, cls).eval()
        parametrize.register_parametrization(model[1], "weight", Doubled())
        known.append([model(images())])
        parametrize.remove_parametrizations(model[1], "weight")
        prune.l1_unstructured(model[1], "weight", 1)
        known[-1].append(model(images()))
        prune.remove(model[1], "weight")
        known[-1].append(model(images()))
    for ours, theirs in zip(*known, strict=True):
        torch.testing.assert_close(ours, theirs)
    model = chain("relu").eval()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    assert model(images()).min() == 0
    with pytest.raises(TypeError, match="fuse_conv_bn_eval"):
        fusion.fuse_conv_bn_eval(model[0], model[1])


def test_optimizers_and_ema_train_it() -> None:
    model = chain("relu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model[1].weight)
    model(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
