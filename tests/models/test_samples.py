"""What belongs to a sample is cut, grouped and paired as samples are; what cannot be is refused."""

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_adversarial
from plain import ROUNDING, functional_step, one_pass, plain_step
from small import Parts, convolutional, images
from torch import Tensor, nn

from apart_func import (
    BatchError,
    Perturbation,
    adversarial_pass,
    functionalize,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    split_state,
)

BATCH = images()
X, Y = BATCH
NAMES = ["cat", "dog", "cow"]

# Targets.


@dataclass
class Labels:
    classes: Any
    factor: float = 1.0


@dataclass(frozen=True)
class Frozen:
    classes: Any
    factor: float = 1.0


class Named(NamedTuple):
    classes: Any
    factor: float = 1.0


def by_attribute(output: Tensor, target: Any) -> Tensor:
    return target.factor * F.cross_entropy(output, torch.as_tensor(target.classes))


def by_key(output: Tensor, target: Any) -> Tensor:
    return target["factor"] * F.cross_entropy(output, torch.as_tensor(target["classes"]))


def by_place(output: Tensor, target: Any) -> Tensor:
    return target[1] * F.cross_entropy(output, target[0])


def by_name(output: Tensor, names: Any) -> Tensor:
    assert len(names) == len(output)
    return F.cross_entropy(output, torch.tensor([NAMES.index(name) for name in names]))


labels = [NAMES[y] for y in Y]
TARGETS: dict[str, tuple[Any, Any]] = {
    "a dataclass": (Labels(Y), by_attribute),
    "a frozen dataclass": (Frozen(Y), by_attribute),
    "a dataclass with a list": (Labels(Y.tolist()), by_attribute),
    "a named tuple": (Named(Y), by_attribute),
    "a named tuple with a list": (Named(Y.tolist()), by_attribute),
    "a dict": ({"classes": Y, "factor": 1.0}, by_key),
    "a dict with a list": ({"classes": Y.tolist(), "factor": 1.0}, by_key),
    "a UserDict": (UserDict(classes=Y, factor=1.0), by_key),
    "a list": ([Y, 1.0], by_place),
    "a tuple": ((Y, 1.0), by_place),
    "a list of strings": (labels, by_name),
    "a tuple of strings": (tuple(labels), by_name),
    "an array of strings": (np.array(labels), by_name),
    "a list of numbers": (Y.tolist(), lambda o, t: F.cross_entropy(o, torch.tensor(t))),
    "an array": (Y.numpy(), lambda o, t: F.cross_entropy(o, torch.from_numpy(np.ascontiguousarray(t)))),
}
WAYS: dict[str, Any] = {
    "two passes": lambda loss, batch: functional_step(convolutional(), batch, loss_fn=loss, groups=2),
    "ratio": lambda loss, batch: functional_step(convolutional(), batch, loss_fn=loss, groups=2, ratio=0.5),
    "micro-batches": lambda loss, batch: functional_step(convolutional(), batch, loss_fn=loss, microbatches=2),
    "one pass": lambda loss, batch: one_pass(convolutional(), batch, loss_fn=loss, groups=4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_is_cut_as_the_samples_are_whatever_it_is_and_keeps_its_type(kind: str, way: str) -> None:
    target, loss_fn = TARGETS[kind]

    def typed(output: Tensor, given: Any) -> Tensor:
        assert type(given) is type(target)
        return loss_fn(output, given)

    found, expected = WAYS[way](typed, (X, target)), WAYS[way](F.cross_entropy, BATCH)
    for field in ("loss", "adversarial_loss", "grads", "perturbation"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), **ROUNDING)


class Opaque:
    """Knows the labels, and nobody knows how to cut it."""

    labels = Y


@pytest.mark.parametrize("way", WAYS)
def test_an_opaque_target_is_taken_whole_and_refused_where_some_of_it_is_wanted(way: str) -> None:
    def loss_fn(output: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(output, target.labels)

    if way == "two passes":
        torch.testing.assert_close(
            WAYS[way](loss_fn, (X, Opaque())).grads, WAYS[way](F.cross_entropy, BATCH).grads, rtol=0, atol=0
        )
        return
    with pytest.raises(BatchError, match=r"holds a Opaque, of which only some samples.*lists with an entry a sample"):
        WAYS[way](loss_fn, (X, Opaque()))


# Inputs that cannot be sliced.


def graph() -> nn.Module:
    torch.manual_seed(0)
    parts = {"norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 3)}
    return Parts(lambda m, x, adjacency: m.head(torch.tanh(m.norm(adjacency @ x))), **parts)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_input_is_taken_whole_and_refused_where_a_part_of_it_is_wanted(layout: torch.layout) -> None:
    torch.manual_seed(1)
    dense, x = (torch.rand(8, 8) < 0.4).double(), torch.randn(8, 4).double()
    batch = (x, dense.to_sparse(layout=layout)), Y
    model = graph()
    expected = plain_step(copy.deepcopy(model), ((x, dense), Y))
    out = make_apart_step(model, F.cross_entropy, epsilon=0.0)(*split_state(model), batch)
    torch.testing.assert_close(out.grads, expected.grads, **ROUNDING)
    with pytest.raises(BatchError, match=rf"layout {layout}.*with ratio=1.0"):
        make_apart_step(model, F.cross_entropy, ratio=0.5)(*split_state(model), batch)


def test_where_the_loss_of_the_batch_is_finite_so_is_a_step_whose_clean_samples_have_no_label() -> None:
    loss_fn = nn.CrossEntropyLoss(ignore_index=-1)
    target = Y.clone()
    target[::2] = -1
    out = one_pass(convolutional(), (X, target), loss_fn=loss_fn)
    assert out.all_finite
    assert out.loss.isnan()
    torch.testing.assert_close(out.adversarial_loss, loss_fn(out.output, target), **ROUNDING)


# Layers that see other rows than one a sample, once.


def looped() -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        for _ in range(int(torch.randint(1, 4, ()))):
            x = x + torch.tanh(model.norm(x))
        return model.head(x)

    return Parts(forward, norm=nn.BatchNorm1d(4), head=nn.Linear(4, 3))


@pytest.mark.parametrize("take", [functional_step, one_pass])
def test_parts_of_a_batch_may_call_a_layer_another_number_of_times(take: Any) -> None:
    model, batch = looped(), (X.flatten(1)[:, :4], Y)
    counts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = make_apart_step(model, F.cross_entropy, groups=2, microbatches=2)(*split_state(model), batch)
        if take is one_pass:
            options: dict[str, Any] = {"epsilon": 0.1, "groups": 2, "microbatches": 2}
            out = make_one_pass_step(model, F.cross_entropy, **options)(*split_state(model), batch)
        assert out.all_finite
        assert out.stat_grads == {} or out.stat_grads["norm"].mean.shape == (2, 4)
        counts.add(int(out.buffers["norm.num_batches_tracked"]))
    assert len(counts) > 1


# As many groups as samples.


class Sequence(nn.Module):
    """Reads a map as a sequence, (positions, samples, channels), so that gradients come in other strides."""

    def __init__(self, order: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head, self.order = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3), order

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.contiguous(memory_format=self.order)))
        sequence = h.flatten(2).permute(2, 0, 1)
        return self.head(torch.tanh(sequence + torch.linspace(0, 1, len(sequence)).to(x).view(-1, 1, 1)).mean(0))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 4, 8, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_network_that_reads_sequences_has_the_definitions_gradients_at_every_number_of_groups(
    order: torch.memory_format, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    model, batch = Sequence(order).to(dtype), images(dtype=dtype)
    shifts = {name: Perturbation(0.2 + mean, scale - 0.2) for name, (mean, scale) in init_perturbation(model).items()}
    out = adversarial_pass(functionalize(model), F.cross_entropy, *split_state(model), batch, shifts, groups=groups)
    exact = {name: Perturbation(*(part.double() for part in shift)) for name, shift in shifts.items()}
    expected = oracle_adversarial(model.double(), F.cross_entropy, X, Y, exact, groups)
    for name, grad in out.grads.items():
        if name != "conv.bias":  # which batch norm cancels
            torch.testing.assert_close(grad.double(), expected.grads[name], rtol=tolerance, atol=tolerance)


def test_a_list_with_a_tensor_without_dimensions_for_every_sample_is_cut() -> None:
    model, (x, y) = convolutional(), images()
    out = make_apart_step(model, lambda o, t: F.cross_entropy(o, torch.stack(t)), ratio=0.5)(
        *split_state(model), (x, list(y))
    )
    expected = make_apart_step(model, F.cross_entropy, ratio=0.5)(*split_state(model), (x, y))
    torch.testing.assert_close(out.grads, expected.grads, rtol=0, atol=0)


def test_a_loss_of_pairs_without_curvature_is_reported_of_the_whole_batch() -> None:
    model = convolutional()
    step = make_one_pass_step(model, lambda o, _: (o[:6] - o[6:]).abs().mean(), epsilon=0.1, groups=4)
    out = step(*split_state(model), images(12))
    whole = (out.output[:6] - out.output[6:]).abs().mean()
    torch.testing.assert_close((out.loss, out.adversarial_loss), (whole, whole), rtol=0, atol=0)


def test_lists_and_numbers_that_a_loss_returns_besides_are_there_of_every_part_of_a_batch() -> None:
    model, (x, y) = convolutional(), images()
    aux = lambda t: {"labels": t.tolist(), "count": len(t), "name": "digits"}  # noqa: E731  # what users write
    step = make_apart_step(model, lambda o, t: (F.cross_entropy(o, t), aux(t)), microbatches=2)
    half = len(y) // 2
    assert step(*split_state(model), (x, y)).aux == {"labels": y.tolist(), "count": [half, half], "name": "digits"}
