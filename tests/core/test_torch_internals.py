"""Canaries: what the library takes for granted of torch without its promise; each says what has changed if it fails."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from apart_func import _torch
from apart_func.snapshot import HOOKS

pytestmark = pytest.mark.usefixtures("dynamo")


def seen_under(transform: Callable[..., Any], look: Callable[[Tensor], Any]) -> Any:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(look(x))
        return x.square().sum()

    transform(function)(torch.ones(3))
    return seen[0]


def graph_inputs(function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[list[Any]]:
    """What the graphs that Dynamo makes of some calls take, graph by graph."""
    found: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(list(inputs))
        return graph

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for arguments in calls:
        compiled(*arguments)
    return found


# Compilers and transforms.


def test_a_compiler_says_that_it_traces() -> None:
    assert not _torch.is_compiling(), "torch.compiler.is_compiling() is True outside of torch.compile"
    compiled = torch.compile(lambda x: x + 1 if _torch.is_compiling() else x, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1, "torch.compiler.is_compiling() is False inside torch.compile"


def test_functorch_says_whether_a_transform_is_active_and_whether_it_differentiates() -> None:
    peek = torch._C._functorch.peek_interpreter_stack
    for transform, differentiates in ((vmap, False), (grad, True), (lambda f: vmap(grad(lambda x: f(x).sum())), True)):
        assert peek() is None, "_functorch.peek_interpreter_stack() is something outside of transforms"
        assert not _torch.is_differentiated(), "_functorch.get_interpreter_stack() has transforms outside of any"
        is_active, found = seen_under(transform, lambda x: (peek() is not None, _torch.is_differentiated()))
        assert is_active, "_functorch.peek_interpreter_stack() is None under a transform: is_traced would not see it"
        assert found == differentiates, "TransformType.Vmap no longer tells a map from what differentiates"


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: vmap(grad(lambda x: f(x).sum()))])
def test_functorch_unwraps_to_the_plain_tensor(transform: Any) -> None:
    plain = seen_under(transform, _torch.unwrapped)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(plain), "_functorch.get_unwrapped leaves a wrapper"
    parameter = nn.Parameter(torch.ones(3))
    assert seen_under(transform, lambda x: _torch.unwrapped(parameter)) is parameter, (
        "_functorch.is_functorch_wrapped_tensor takes a parameter for a wrapper"
    )


# Backward and checkpoints.


def test_autograd_numbers_the_backward_that_runs() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)

    def backward_inside(g: Tensor) -> None:
        seen.append(_torch.backward_task())
        y = torch.ones(2, requires_grad=True)
        y.register_hook(lambda g: seen.append(_torch.backward_task()))
        with torch.enable_grad():
            y.sum().backward()

    x.register_hook(backward_inside)
    assert _torch.backward_task() == -1, "_current_graph_task_id() is not -1 outside of a backward"
    x.sum().backward()
    assert -1 not in seen, "_current_graph_task_id() is -1 during a backward: checkpointed layers would count twice"
    assert len(set(seen)) == 2, "a backward inside of another has its number: it would be taken for a recomputation"
    assert _torch.backward_task() == -1, "_current_graph_task_id() remembers a backward that has ended"


def test_checkpointing_is_seen_by_its_saved_tensor_hooks() -> None:
    seen: list[bool] = []

    def segment(x: Tensor) -> Tensor:
        seen.append(_torch.is_checkpointed())
        return x.sin()

    assert not _torch.is_checkpointed(), "_top_saved_tensors_default_hooks has hooks outside of a checkpoint"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not _torch.is_checkpointed(), "hooks of others on saved tensors are taken for those of a checkpoint"
    checkpoint(segment, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert seen == [True], (
        "_top_saved_tensors_default_hooks no longer shows hooks from torch.utils.checkpoint inside a checkpoint"
    )


def test_a_mode_that_sees_every_operator_is_seen_as_that_of_selective_checkpointing() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert not _torch.has_dispatch_mode(), "_len_torch_dispatch_stack() counts a mode where there is none"
    with Watch():
        assert _torch.has_dispatch_mode(), "_len_torch_dispatch_stack() no longer counts modes"
    assert not _torch.has_dispatch_mode(), "_len_torch_dispatch_stack() remembers a mode that has ended"


# Dynamo.


def test_sizes_of_marked_tensors_are_constants_of_a_graph_and_others_are_not() -> None:
    def marked(x: Tensor) -> Tensor:
        _torch.specialize([x])
        return x * x.shape[0]

    calls = [(torch.ones(size),) for size in (2, 3, 5)]
    graphs = graph_inputs(marked, *calls)
    symbols = [value for inputs in graphs for value in inputs if isinstance(value, torch.SymInt)]
    assert not symbols, "_dynamo.mark_static during tracing no longer keeps sizes from becoming symbols"
    assert len(graphs) == 3, f"{len(graphs)} graphs for three sizes; expected one for each"
    torch._dynamo.reset()
    assert len(graph_inputs(lambda x: x * x.shape[0], *calls)) < 3, "Dynamo makes no symbols: `specialize` can go"


def test_numbers_on_a_module_are_constants_of_a_graph() -> None:
    class Function:
        def __init__(self, number: Any) -> None:
            self.constants = _torch.Constants(number=number)

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.constants.number

    graphs = [graph_inputs(Function(number), (torch.ones(2),)) for number in (2, 3, 5, 0.25, 0.5)]
    symbols = [value for of_number in graphs for value in of_number[0] if not isinstance(value, Tensor)]
    assert not symbols, "Dynamo makes symbols of numbers on a module: settings would no longer be constants"


# Operators.


def test_unsafe_view_shares_memory_and_is_no_view_to_autograd() -> None:
    x = torch.arange(6.0).requires_grad_()
    y = _torch.unsafe_view(x * 1, torch.Size([2, 3]))
    assert y.shape == (2, 3)
    assert y._base is None, "aten._unsafe_view makes a view: an in-place activation after it would copy gradients"
    plain = torch.zeros(6)
    assert _torch.unsafe_view(plain, torch.Size([2, 3])).data_ptr() == plain.data_ptr(), "aten._unsafe_view copies"
    (slope,) = torch.autograd.grad(y.relu_().sum(), x)
    assert torch.equal(slope, (x > 0).float()), "aten._unsafe_view is no longer differentiated as a reshape"


def test_the_kernels_of_batch_norm_take_and_return_what_they_did() -> None:
    x, weight, bias = torch.randn(4, 3, 2), torch.randn(3), torch.randn(3)
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    expected_var, expected_mean = torch.var_mean(x, (0, 2), correction=0)
    changed = "batch_norm_update_stats no longer returns mean and biased variance"
    torch.testing.assert_close((mean, var), (expected_mean, expected_var), msg=lambda m: f"{changed}: {m}")
    half = torch.zeros(3)
    wide, _ = torch.batch_norm_update_stats(x.bfloat16(), half, half, 0.0)
    assert wide.dtype == torch.float32, "running statistics of float32 no longer widen moments of half precision"

    out, unused = torch.empty_like(x), weight.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, 1e-5, out=out, save_mean=unused, save_invstd=unused
    )
    expected = F.batch_norm(x, mean, var, weight, bias, False)
    torch.testing.assert_close(out, expected, msg=lambda m: f"native_batch_norm.out computes something else: {m}")

    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    upstream = torch.randn(4, 3, 2)
    plain = torch.autograd.grad(F.batch_norm(x, None, None, weight, bias, True), leaves, upstream)
    direct = torch.ops.aten.native_batch_norm_backward.default(
        upstream, x, weight, None, None, mean, (var + 1e-5).rsqrt(), True, 0.0, (True, True, True)
    )
    changed_backward = "native_batch_norm_backward computes something else"
    torch.testing.assert_close(tuple(direct), plain, msg=lambda m: f"{changed_backward}: {m}")


def test_a_batch_norm_that_starts_from_nothing_leaves_the_statistics_of_the_batch() -> None:
    x = torch.randn(4, 3, 2)
    mean, var = torch.zeros(3), torch.zeros(3)
    torch.batch_norm(x, torch.ones(3), torch.zeros(3), mean, var, True, 1.0, 1e-5, True)
    torch.testing.assert_close(
        (var, mean), torch.var_mean(x, (0, 2)), msg=lambda m: f"momentum 1 does not take all: {m}"
    )


# Modules.


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SyncBatchNorm])
def test_every_batch_norm_of_torch_is_a_batchnorm_base_with_its_forward(kind: type[nn.Module]) -> None:
    assert issubclass(kind, _BatchNorm), f"{kind.__name__} is no _BatchNorm any more: it would not be found"
    assert kind.forward in (_BatchNorm.forward, SyncBatchNorm.forward), (
        f"{kind.__name__} has a forward of its own: what it does besides F.batch_norm would be skipped"
    )
    attributes = {"num_features", "eps", "momentum", "affine", "track_running_stats", "training"}
    registers = {"running_mean", "running_var", "num_batches_tracked"}
    layer: Any = kind(3)
    assert attributes <= vars(layer).keys(), f"{kind.__name__} lost {sorted(attributes - vars(layer).keys())}"
    assert layer._buffers.keys() == registers, f"{kind.__name__} has buffers {sorted(layer._buffers)}"
    assert layer._parameters.keys() == {"weight", "bias"}, f"{kind.__name__} has {sorted(layer._parameters)}"
    with pytest.raises(ValueError, match="expected"):
        layer._check_input_dim(torch.zeros(3))


def test_the_forward_of_batch_norm_counts_and_calls_the_function_once_and_does_nothing_else() -> None:
    calls: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    layer = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    with Watch():
        layer(x)
    computed = [func for func in calls if func.__name__ not in ("dim", "__get__", "add_")]
    assert computed == [F.batch_norm], f"_BatchNorm.forward calls {computed}; expected F.batch_norm alone"
    expected = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    assert list(inspect.signature(F.batch_norm).parameters) == expected, "F.batch_norm takes other arguments"


def test_tensor_modules_keep_their_tensors_and_hooks_where_copies_look_for_them() -> None:
    attributes = vars(nn.Module())
    for register in ("_parameters", "_buffers", "_modules"):
        assert isinstance(attributes[register], dict), f"nn.Module has no dict {register} any more"
    expected = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
    assert expected <= HOOKS, f"nn.Module keeps hooks elsewhere: {sorted(expected - HOOKS)} are gone"
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    filled = {name for name, value in vars(model).items() if isinstance(value, dict) and value}
    assert "_forward_hooks" in filled, "register_forward_hook no longer writes _forward_hooks"
