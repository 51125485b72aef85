"""What a person sees who prints an output: shapes, and few characters."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from apart_func import (
    BatchStats,
    ProxyOutput,
    StatGrads,
    StepOutput,
    make_apart_step,
    perturbed_stats,
    split_state,
)


def output(groups: int = 2) -> StepOutput:
    model = convolutional(dtype=torch.float32)
    step = make_apart_step(model, F.cross_entropy, epsilon=0.1, groups=groups)
    return step(*split_state(model), images(dtype=torch.float32))


def test_an_output_is_printed_as_a_line_for_every_part() -> None:
    out = output()
    assert repr(out).splitlines() == [
        "StepOutput",
        "  grads              8 tensors, 288 values, float32",
        "  buffers            6 tensors, 20 values, float32 and int64",
        f"  loss               {out.loss:.4g}",
        f"  adversarial_loss   {out.adversarial_loss:.4g}",
        "  output             (8, 3) float32",
        "  stats              2 layers",
        "  stat_grads         2 layers",
        "  perturbation       2 layers",
        "  adversarial_stats  2 layers",
        "  all_finite         True",
        "  aux                tuple, 0 parts",
    ]
    assert str(out) == repr(out)


def test_what_belongs_to_a_layer_is_printed_on_one_line() -> None:
    out = output()
    assert repr(out.perturbation["1"]) == "Perturbation(mean=(4,) float32, scale=(4,) float32)"
    assert repr(out.stat_grads["4"]) == "StatGrads(mean=(5,) float32, scale=(5,) float32)"
    assert repr(out.stats["4"]) == "BatchStats(mean=(5,) float32, var=(5,) float32)"
    perturbed = perturbed_stats(out.stats, out.perturbation)["1"]
    assert repr(perturbed) == "PerturbedStats(mean=(4,) float32, std=(4,) float32)"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"scores": torch.zeros(8, 3).double()}, "1 tensor, 24 values, float64"),
        ([torch.zeros(8, 3), None], "list, 2 parts"),
        (None, "None"),
    ],
)
def test_a_pass_is_printed_with_whatever_its_model_returns(output: Any, expected: str) -> None:
    out = ProxyOutput(torch.zeros(()), output, {}, {}, {}, {})
    assert f"  output      {expected}" in repr(out).splitlines()


def test_inside_a_transform_shapes_are_printed_and_no_value_is_read() -> None:
    model, batch = convolutional(), images()
    step = make_apart_step(model, F.cross_entropy, groups=2)
    printed = []

    def at(epsilon: Tensor) -> Tensor:
        out = step(*split_state(model), batch, epsilon=epsilon)
        printed.append(repr(out))
        return out.adversarial_loss

    torch.func.vmap(at)(torch.tensor([0.1, 0.2]))
    torch.func.grad(lambda scale: at(torch.tensor(0.1)) * scale)(torch.tensor(1.0))
    for text in printed:
        assert "  adversarial_loss   () float64" in text.splitlines()


def test_tensors_without_values_are_printed() -> None:
    with FakeTensorMode():
        assert "StatGrads(mean=() float32" in repr(StatGrads(torch.zeros(()), torch.zeros(())))
    assert "BatchStats(mean=() float32" in repr(BatchStats(torch.zeros((), device="meta"), torch.zeros(())))


def test_outputs_are_trees_and_values_as_ever() -> None:
    out = output()
    for copied in (tree_unflatten(*tree_flatten(out)), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert repr(copied) == repr(out)


def test_the_gap_is_the_second_loss_less_the_first() -> None:
    out = output()
    assert torch.equal(out.loss_gap, out.adversarial_loss - out.loss)
    assert output(groups=0).loss_gap > 0  # of the same samples in one group, at statistics that raise the loss
