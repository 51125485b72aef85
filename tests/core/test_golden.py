"""The original implementation's numbers, replayed over all their steps: by the definition, and by the library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden.cases import NAMES, Case, Outcome, assert_as_recorded, load
from loops import both_passes, gradients
from oracle import oracle_step
from torch import Tensor

from apart_func import APART, make_apart_step, split_state

State = dict[str, Tensor]


def outcome_of(out: Any, params: State, buffers: State) -> Outcome:
    return Outcome(out.loss, out.adversarial_loss, out.output, out.grads, out.stat_grads, params, buffers)


def through_the_definition(case: Case) -> list[Outcome]:
    model, outcomes = case.model(), []
    for batch in case.batches():
        out = oracle_step(model, F.cross_entropy, batch, epsilon=case.epsilon, groups=case.groups, ratio=case.ratio)
        params = {name: p.detach() - case.learning_rate * out.grads[name] for name, p in model.named_parameters()}
        model.load_state_dict(params | out.buffers)
        outcomes.append(outcome_of(out, params, out.buffers))
    return outcomes


def through_the_functional_step(case: Case) -> list[Outcome]:
    model, outcomes = case.model(), []
    params, buffers = split_state(model)
    apart_step = make_apart_step(model, F.cross_entropy, epsilon=case.epsilon, groups=case.groups, ratio=case.ratio)
    for batch in case.batches():
        out = apart_step(params, buffers, batch)
        params = {name: p - case.learning_rate * out.grads[name] for name, p in params.items()}
        buffers = out.buffers
        outcomes.append(outcome_of(out, params, buffers))
    return outcomes


def through_the_drop_in(case: Case) -> list[Outcome]:
    model, outcomes = case.model(), []
    apart = APART(model, epsilon=case.epsilon, groups=case.groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.learning_rate)
    for x, y in case.batches():
        optimizer.zero_grad()
        losses_and_output = both_passes(apart, (x, y), case.ratio)
        grads = gradients(model)
        optimizer.step()
        r = len(x) / (len(x) + int(case.ratio * len(x)))
        stat_grads = {layer: (g.mean / r, g.scale / r) for layer, g in apart.stat_grads.items()}
        state = ({name: tensor.clone() for name, tensor in part.items()} for part in split_state(model))
        outcomes.append(Outcome(*losses_and_output, grads, stat_grads, *state))
    return outcomes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through", [through_the_definition, through_the_functional_step, through_the_drop_in])
def test_a_golden_case_is_met_in_all_its_numbers(through: Callable[[Case], list[Outcome]], name: str) -> None:
    """Losses, output, statistic gradients, gradients, and what parameters and buffers are after the last step."""
    case = load(name)
    outcomes = through(case)
    assert_as_recorded(case, outcomes)
    # Not among the recorded numbers: the original counts the adversarial pass too.
    counts = {key: n for key, n in outcomes[-1].buffers.items() if key.endswith("num_batches_tracked")}
    assert counts == {key: before + case.steps for key, before in case.under("buffer/").items() if key in counts}
    assert counts
