"""A compiled model in the contexts of the drop-in: one graph for each pass, with the numbers of the eager model."""

import copy
from typing import Any

import pytest
import torch
from agreement import relative_error
from loops import both_passes, gradients, in_one_pass
from small import Counting, convolutional, images, one_layer
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from apart_func import APART

# Another order of float64 sums.
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}
pytestmark = pytest.mark.usefixtures("dynamo")


def norm_act() -> nn.Module:
    """`convolutional` with a layer that has a forward and a counter of its own, and one with a buffer."""
    model = convolutional()
    model[1] = BatchNormAct2d(4).double()
    model[2] = Counting()
    return model


def without_prefix(tree: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("_orig_mod."): value for name, value in tree.items()}


@pytest.mark.parametrize(("build", "ratio"), [(convolutional, 1.0), (norm_act, 0.5)])
def test_two_passes_are_two_graphs_that_are_never_compiled_again(build: Any, ratio: float) -> None:
    model = build()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    apart = APART(compiled, groups=2)
    eager = APART(twin, groups=2, rule=lambda *_: without_prefix(apart.perturbation))
    for t in range(4):
        apart.set_epsilon(0.05 * t)
        for each in (apart, eager):
            each.model.zero_grad()
            both_passes(each, images(16, seed=t), ratio)
        assert relative_error(without_prefix(apart.stats), eager.stats) < 1e-9
        assert relative_error(without_prefix(apart.stat_grads), eager.stat_grads) < 1e-9
        assert relative_error(gradients(model), gradients(twin)) < 1e-9
        assert relative_error(dict(model.named_buffers()), dict(twin.named_buffers())) < 1e-9
        assert counter.frame_count == 2
        # A graph that is kept would also have to be differentiated.
        assert not any(part.requires_grad for stats in apart.stats.values() for part in stats)


def test_one_pass_is_one_graph_whatever_signs_are_drawn() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, twin = convolutional(), convolutional()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    forms = APART(compiled, 0.3, 4), APART(twin, 0.3, 4)
    for seed in range(3):
        for apart in forms:
            apart.model.zero_grad()
            torch.manual_seed(seed)
            in_one_pass(apart, images(seed=seed))
        torch.testing.assert_close(gradients(model), gradients(twin), **ROUNDING)
    assert counter.frame_count == 1


def test_a_compiled_model_is_plain_again_outside_the_contexts() -> None:
    model, (x, y) = one_layer(), images()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    apart = APART(compiled, groups=2, epsilon=0.5)
    for _ in range(2):
        plain = copy.deepcopy(model)
        torch.testing.assert_close(compiled(x), plain(x), **ROUNDING)
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), **ROUNDING)
        both_passes(apart, (x, y))
        assert counter.frame_count == 3


@pytest.mark.slow
def test_a_model_compiled_by_inductor_steps_like_the_eager_one() -> None:
    model, batch = convolutional(), images()
    compiled = copy.deepcopy(model)
    both_passes(APART(model, groups=2), batch, ratio=0.5)
    both_passes(APART(torch.compile(compiled, dynamic=False), groups=2), batch, ratio=0.5)
    torch.testing.assert_close(gradients(compiled), gradients(model), **ROUNDING)
