"""The drop-in's one pass: the step of the function at signs that it draws, in a context around the user's loop."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import gradients, in_one_pass
from small import convolutional, images, signs_differ
from torch import Tensor, nn

from apart_func import (
    APART,
    BatchError,
    ModelError,
    SettingError,
    StepOutput,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)

BATCH = images()
# The compared computations differ in the order of float64 sums only.
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}


def functional_pass(model: nn.Module, batch: Any = BATCH, **options: Any) -> StepOutput:
    options = {"epsilon": 0.3, "groups": 4} | options
    return make_one_pass_step(model, F.cross_entropy, **options)(*split_state(model), batch)


def test_it_takes_the_steps_of_the_function_from_the_same_seed() -> None:
    model = convolutional()
    apart = APART(model, 0.3, 4)
    for seed in range(3):
        batch = images(seed=seed)
        torch.manual_seed(seed)
        out = functional_pass(copy.deepcopy(model), batch)
        torch.manual_seed(seed)
        model.zero_grad()
        in_one_pass(apart, batch)
        torch.testing.assert_close(apart.perturbation, out.perturbation, rtol=0, atol=0)
        torch.testing.assert_close(gradients(model), out.grads, **ROUNDING)
        torch.testing.assert_close(dict(model.named_buffers()), out.buffers, **ROUNDING)
        torch.testing.assert_close(apart.stats, out.stats, **ROUNDING)


def test_a_rule_of_gradients_is_refused_with_the_step_that_takes_one() -> None:
    apart = APART(convolutional(), groups=4, rule=sign_perturbation)
    with pytest.raises(SettingError, match=r"draws its perturbation.*Leave rule=None, or take make_one_pass_step"):
        in_one_pass(apart, BATCH)


def test_in_one_drop_in_each_context_has_the_rule_that_suits_it() -> None:
    apart = APART(convolutional(), 0.1, 4)
    for context in (apart.to_proxy, apart.to_adver):
        with context():
            F.cross_entropy(apart.model(BATCH[0]), BATCH[1]).backward()
    found = apart.perturbation
    torch.testing.assert_close(found, sign_perturbation({}, apart.stat_grads, torch.tensor(0.1).double()))
    in_one_pass(apart, BATCH)
    assert apart.stat_grads == {}
    assert signs_differ(found, apart.perturbation)


def test_micro_batches_in_one_context_add_up_under_the_same_signs() -> None:
    apart, twin = APART(convolutional(), 0.3, 2), convolutional()
    torch.manual_seed(0)
    with apart.one_pass():
        for start in (0, 4):
            part = slice(start, start + 4)
            (F.cross_entropy(apart.model(BATCH[0][part]), BATCH[1][part]) / 2).backward()
    torch.manual_seed(0)
    out = functional_pass(twin, groups=2, microbatches=2)
    torch.testing.assert_close(gradients(apart.model), out.grads, **ROUNDING)
    torch.testing.assert_close(dict(apart.model.named_buffers()), out.buffers, **ROUNDING)


@pytest.mark.parametrize("groups", [0, 1])
def test_it_needs_a_number_of_groups(groups: int) -> None:
    with pytest.raises(SettingError, match=f"groups={groups} makes one of the whole batch.*groups=4"):
        in_one_pass(APART(convolutional(), 0.1, groups), BATCH)


@pytest.mark.parametrize(("fraction", "which"), [(0.0, "none"), (1.0, "all")])
def test_groups_of_one_kind_are_refused_in_the_right_words(fraction: float, which: str) -> None:
    with (
        pytest.raises(SettingError, match=f"clean_fraction={fraction} make {which} of the groups clean"),
        APART(convolutional(), 0.1, 4).one_pass(fraction),
    ):
        pytest.fail("entered")


def test_a_short_last_batch_is_refused_with_its_likely_cause() -> None:
    with pytest.raises(BatchError, match=r"groups=4 does not divide the 6.*drop_last=True in the data loader\."):
        in_one_pass(APART(convolutional(), 0.1, 4), images(6))


class Freezing(nn.Module):
    """Puts a layer that keeps no running statistics in evaluation mode, as it runs or before."""

    def __init__(self, is_late: bool) -> None:
        super().__init__()
        self.body = convolutional()
        self.body[4] = nn.BatchNorm2d(5, track_running_stats=False).double().train(is_late)

    def forward(self, x: Tensor) -> Tensor:
        self.body[4].eval()
        return self.body(x)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_layer_that_mixes_clean_and_perturbed_samples_is_refused_by_its_name(is_late: bool) -> None:
    message = r"layer 'body.4' \(BatchNorm2d\).*normalises clean and perturbed samples together"
    with pytest.raises(ModelError, match=message):
        in_one_pass(APART(Freezing(is_late), 0.1, 2), BATCH)
    with pytest.raises(ModelError, match=message):
        functional_pass(Freezing(is_late), groups=2)
