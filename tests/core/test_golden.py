"""The original implementation's numbers, replayed over all their steps: by the definition, and by the library."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch.nn.functional as F
from golden.cases import NAMES, Case, Outcome, as_recorded, assert_as_recorded, load
from oracle import oracle_step

from apart_func import make_apart_step, split_state


def through_the_definition(case: Case) -> list[Outcome]:
    model, outcomes = case.model(), []
    for batch in case.batches():
        out = oracle_step(model, F.cross_entropy, batch, epsilon=case.epsilon, groups=case.groups, ratio=case.ratio)
        params = {name: p.detach() - case.learning_rate * out.grads[name] for name, p in model.named_parameters()}
        model.load_state_dict(params | out.buffers)
        outcomes.append(
            Outcome(out.loss, out.adversarial_loss, out.output, out.grads, out.stat_grads, params, out.buffers)
        )
    return outcomes


def through_the_library(case: Case) -> list[Outcome]:
    model, outcomes = case.model(), []
    params, buffers = split_state(model)
    apart_step = make_apart_step(model, F.cross_entropy, epsilon=case.epsilon, groups=case.groups, ratio=case.ratio)
    for batch in case.batches():
        out = apart_step(params, buffers, batch)
        params = {name: p - case.learning_rate * out.grads[name] for name, p in params.items()}
        buffers = out.buffers
        outcomes.append(Outcome(out.loss, out.adversarial_loss, out.output, out.grads, out.stat_grads, params, buffers))
    return outcomes


@cache
def replay(through: Callable[[Case], list[Outcome]], name: str) -> tuple[Case, list[Outcome]]:
    case = load(name)
    return case, through(case)


every_case = pytest.mark.parametrize("name", NAMES)
both_ways = pytest.mark.parametrize("through", [through_the_definition, through_the_library])


@every_case
@both_ways
def test_golden_losses_of_every_step_are_met(through: Callable[[Case], list[Outcome]], name: str) -> None:
    assert_as_recorded(*replay(through, name), "loss/", "adversarial_loss/")


@every_case
@both_ways
def test_golden_output_of_the_proxy_pass_is_met(through: Callable[[Case], list[Outcome]], name: str) -> None:
    assert_as_recorded(*replay(through, name), "output/")


@every_case
@both_ways
def test_golden_statistic_gradients_are_met(through: Callable[[Case], list[Outcome]], name: str) -> None:
    assert_as_recorded(*replay(through, name), "stat_grad_mean/", "stat_grad_var/")


@every_case
@both_ways
def test_golden_gradients_of_the_parameters_are_met(through: Callable[[Case], list[Outcome]], name: str) -> None:
    assert_as_recorded(*replay(through, name), "grad/")


@every_case
@both_ways
def test_golden_parameters_after_the_last_step_are_met(through: Callable[[Case], list[Outcome]], name: str) -> None:
    assert_as_recorded(*replay(through, name), "final_param/")


@every_case
@both_ways
def test_golden_running_statistics_after_the_last_step_are_met(
    through: Callable[[Case], list[Outcome]], name: str
) -> None:
    assert_as_recorded(*replay(through, name), "final_buffer/")


@every_case
@both_ways
def test_num_batches_tracked_counts_each_step_once(through: Callable[[Case], list[Outcome]], name: str) -> None:
    # Not among the recorded numbers: the original counts the adversarial pass too.
    case, outcomes = replay(through, name)
    counts = {key: n for key, n in outcomes[-1].buffers.items() if key.endswith("num_batches_tracked")}
    assert counts == {key: before + case.steps for key, before in case.under("buffer/").items() if key in counts}
    assert counts


@every_case
def test_a_replay_yields_every_recorded_result_and_no_other(name: str) -> None:
    case, outcomes = replay(through_the_definition, name)
    assert as_recorded(outcomes).keys() == case.results().keys()
