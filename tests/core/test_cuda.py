"""Every form of a step on CUDA: right in every precision and layout, no host that waits, and inside a CUDA graph."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import FORMS, GROUPS, grads_of, make
from small import convolutional, images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from apart_func import Perturbation, make_apart_step, split_state

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Of all gradients together, ‖error‖ / ‖gradient‖: a dozen roundings, of which the largest counts.
TOLERANCE = {None: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
PRECISIONS = (None, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions in float32, not in TF32, which has the mantissa of float16."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def smooth(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two convolutions with batch norm; no ReLU, which half precision puts on the other side of its kink."""
    model = convolutional(dtype=dtype)
    for name, layer in model.named_children():
        if isinstance(layer, nn.ReLU):
            model[int(name)] = nn.SiLU(inplace=True)
    return model


def case(layout: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    x, y = images(16, dtype=torch.float32)
    return smooth().to(DEVICE, memory_format=layout), (x.to(DEVICE, memory_format=layout), y.to(DEVICE))


def error_of(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    far, near = (torch.cat([tree[name].detach().double().cpu().flatten() for name in exact]) for tree in (found, exact))
    return float((far - near).norm() / near.norm())


# the values


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_float64_on_a_cpu(form, precision, layout):
    # At radius 0: in half precision a statistic gradient that is almost zero has either sign.
    exact = grads_of(make(form, smooth(torch.float64), epsilon=0.0)(images(16)))
    model, batch = case(layout)
    found = grads_of(make(form, model, precision, epsilon=0.0)(batch))
    assert error_of(found, exact) < TOLERANCE[precision]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("groups", [1, GROUPS, 16])
def test_gradients_under_a_perturbation_are_those_of_float64_on_a_cpu(groups, precision, layout):
    def alternating(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        """The same perturbation whatever the gradients are."""

        def signs(statistic: Tensor) -> Tensor:
            return torch.ones_like(statistic).index_fill(
                0, torch.arange(0, len(statistic), 2, device=statistic.device), -1
            )

        return {
            layer: Perturbation(epsilon * signs(each.mean), epsilon * signs(each.var)) for layer, each in stats.items()
        }

    def step_of(model: nn.Module, autocast_dtype: torch.dtype | None) -> Any:
        return make_apart_step(
            model, F.cross_entropy, epsilon=0.2, groups=groups, rule=alternating, autocast_dtype=autocast_dtype
        )

    model = smooth(torch.float64)
    exact = step_of(model, None)(*split_state(model), images(16))
    model, batch = case(layout)
    found = step_of(model, precision)(*split_state(model), batch)
    assert error_of(found.grads, exact.grads) < TOLERANCE[precision]
    assert error_of(found.buffers, exact.buffers) < TOLERANCE[precision]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_half_precision_has_gradients_of_its_own_dtype_and_float32_statistics(form, dtype):
    model, (x, y) = case()
    model.to(dtype)
    out = make(form, model)((x.to(dtype), y))
    assert {grad.dtype for grad in grads_of(out).values()} == {dtype}
    if not isinstance(out, dict):
        assert {leaf.dtype for leaf in tree_leaves((out.stats, out.stat_grads, out.perturbation))} == {torch.float32}
        assert out.all_finite


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_on_the_device(form):
    model, batch = case()
    leaves, _ = tree_flatten_with_path(make(form, model)(batch))
    assert {str(path): leaf.device.type for path, leaf in leaves if leaf.device.type != DEVICE} == {}


# how it gets there


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make whatever has the host wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_host_does_not_wait_for_the_device(form, precision):
    model, batch = case()
    step = make(form, model, precision)
    step(batch)  # what is set up once may
    with no_waiting():
        step(batch)


class Convolutions(TorchDispatchMode):
    """Notes whether what convolutions are given is channels_last, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            for given in args[:2]:
                self.found.append((str(func), given.is_contiguous(memory_format=torch.channels_last)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_convolutions_of_a_channels_last_model_see_channels_last_activations(form, precision):
    model, batch = case(torch.channels_last)
    step = make(form, model, precision)
    with Convolutions() as convolutions:
        step(batch)
    passes = 1 if "one" in form else 2
    assert len(convolutions.found) == passes * 2 * 2 * 2  # two layers, forward and backward, two tensors each
    assert all(is_channels_last for _, is_channels_last in convolutions.found), convolutions.found


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", ["two passes", "one pass"])
def test_a_step_in_a_cuda_graph_computes_the_same_for_other_batches(form, precision):
    model, batch = case()
    step = make(form, model, precision)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(batch)
    other, _ = images(16, dtype=torch.float32, seed=2)
    batch[0].copy_(other)
    graph.replay()
    found = deepcopy(captured.grads)
    assert error_of(found, step(batch).grads) < TOLERANCE[precision]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mode"), [("two passes", "reduce-overhead"), ("one pass", "default")])
def test_a_compiled_step_computes_the_same(form, mode):
    model, batch = case()
    step = make(form, model)
    expected = step(batch).grads
    compiled = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
    for _ in range(3):  # with reduce-overhead the third call replays a CUDA graph
        found = {name: grad.clone() for name, grad in compiled(batch).grads.items()}
    assert error_of(found, expected) < TOLERANCE[None]
