"""What real loops do inside, between and around the contexts: it trains as they mean it, or somebody says why not."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import both_passes, gradients
from plain import Drops
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from apart_func import APART, BatchError, ModelError, SettingError, UsageError

BATCH = images()
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}


def loss_of(model: nn.Module, batch: Any = BATCH) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def two_passes(apart: APART, before: Callable[[nn.Module], Any] = lambda model: None, late: bool = False) -> None:
    """Both passes, each after something else that the user does in the context; a late backward comes after it."""
    for context in (apart.to_proxy, apart.to_adver):
        with context():
            before(apart.model)
            loss = loss_of(apart.model) / 2
            if not late:
                loss.backward()
        if late:
            loss.backward()


def one_pass(apart: APART, before: Callable[[nn.Module], Any] = lambda model: None, late: bool = False) -> None:
    torch.manual_seed(0)
    with apart.one_pass():
        before(apart.model)
        loss = loss_of(apart.model)
        if not late:
            loss.backward()
    if late:
        loss.backward()


every_form = pytest.mark.parametrize("take", [two_passes, one_pass])


def assert_same_training(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(gradients(found), gradients(expected), **ROUNDING)
    torch.testing.assert_close(dict(found.named_buffers()), dict(expected.named_buffers()), **ROUNDING)


@every_form
def test_backward_may_be_called_inside_the_context_or_after_it(take: Any) -> None:
    own, expected = APART(convolutional(), 0.3, 2), APART(convolutional(), 0.3, 2)
    take(own, late=True)
    take(expected)
    assert_same_training(own.model, expected.model)


# What happens inside.


@every_form
def test_a_model_may_be_in_evaluation_mode_until_the_forward_as_a_trainer_leaves_it(take: Any) -> None:
    """Trainers put the model in training mode themselves, in their training step; after an evaluation that matters."""
    own, expected = APART(convolutional(), 0.3, 2), APART(convolutional(), 0.3, 2)
    own.model.eval()
    take(own, nn.Module.train)
    take(expected)
    assert_same_training(own.model, expected.model)


@every_form
def test_layers_may_change_their_mode_between_steps(take: Any) -> None:
    own, expected = APART(convolutional(), 0.3, 2), convolutional()
    take(own)
    own.model.zero_grad()
    own.model.load_state_dict(expected.state_dict())
    for model in (own.model, expected):
        model[1].eval()
    take(own)
    take(APART(expected, 0.3, 2))
    assert_same_training(own.model, expected)


def evaluate(model: nn.Module) -> None:
    """An attack, a teacher or a pseudo-label: the model evaluates, then trains on."""
    model.eval()
    torch.testing.assert_close(model(BATCH[0]), copy.deepcopy(model)(BATCH[0]))  # which is in no context
    model.train()


def look(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(images(6, seed=3)[0])
    model.train()


def fail(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        model(BATCH[0][:, :1])


@every_form
@pytest.mark.parametrize("before", [evaluate, look, fail])
def test_other_forwards_of_the_model_inside_a_context_change_nothing(take: Any, before: Any) -> None:
    own, expected = APART(convolutional(), 0.3, 2), APART(convolutional(), 0.3, 2)
    take(own, before)
    take(expected)
    assert_same_training(own.model, expected.model)


def test_a_context_in_which_the_model_only_evaluates_is_refused() -> None:
    apart = APART(convolutional().eval())
    for context in (apart.to_proxy, apart.one_pass):
        apart.groups = 2
        with pytest.raises(ModelError, match=r"none of the 2 batch-norm layers.*model.train\(\)"), context():
            apart.model(BATCH[0])


@every_form
def test_a_batch_that_skips_every_layer_is_plain_training(take: Any) -> None:
    own, plain = Drops(), Drops()
    apart = APART(own, 0.3, 2)
    take(apart)
    loss_of(plain).backward()
    assert_same_training(own, plain)
    own.skips = False
    take(apart)
    assert own.norm.num_batches_tracked == 1


# What happens between.


def test_a_proxy_pass_that_another_one_follows_is_dropped_with_a_warning() -> None:
    apart, last = APART(convolutional()), APART(convolutional())
    with apart.to_proxy():
        loss_of(apart.model, images(seed=0)).backward()
    with pytest.warns(UserWarning, match="of the proxy pass before are dropped"), apart.to_proxy():
        loss_of(apart.model).backward()
    with last.to_proxy():
        loss_of(last.model).backward()
    for each in (apart, last):
        with each.to_adver():
            loss_of(each.model).backward()
    torch.testing.assert_close(apart.perturbation, last.perturbation, rtol=0, atol=0)


def by_grad(model: nn.Module, loss: Tensor) -> None:
    params = list(model.parameters())
    for parameter, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        parameter.grad = grad


def by_inputs(model: nn.Module, loss: Tensor) -> None:
    loss.backward(inputs=list(model.parameters()))


@pytest.mark.parametrize("differentiate", [by_grad, by_inputs])
def test_a_proxy_pass_whose_statistics_were_not_differentiated_by_is_said_to_leave_no_perturbation(differentiate):
    apart = APART(convolutional())
    with apart.to_proxy():
        differentiate(apart.model, loss_of(apart.model))
    with pytest.warns(UserWarning, match=r"left no statistic gradients.*Call loss.backward\(\)"), apart.to_adver():
        loss_of(apart.model).backward()
    assert all((part == 0).all() for shift in apart.perturbation.values() for part in shift)


def test_a_linear_probe_whose_features_have_no_graph_trains_its_head_at_no_perturbation() -> None:
    body = convolutional().requires_grad_(False)
    model = Parts(lambda m, x: m.head(torch.no_grad()(m.body)(x)), body=body, head=nn.Linear(3, 3))
    plain = copy.deepcopy(model)
    both_passes(APART(model), BATCH)
    loss_of(plain).backward()
    assert_same_training(model, plain)


# Settings.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 5.0),
        ("epsilon", -0.3),
        ("epsilon", float("nan")),
        ("groups", 2.5),
        ("groups", -7),
        ("rows", "sorted"),
    ],
)
@pytest.mark.parametrize("context", ["to_proxy", "one_pass"])
def test_an_attribute_that_was_set_out_of_its_range_is_refused_at_the_next_context(name, value, context):
    apart = APART(convolutional(), 0.1, 2)
    setattr(apart, name, value)
    with pytest.raises(SettingError, match=f"{name}={value!r}"), getattr(apart, context)():
        pytest.fail("entered")
    setattr(apart, name, {"epsilon": 0.2, "groups": 4, "rows": None}[name])
    two_passes(apart)


def test_a_radius_that_requires_gradients_leaves_no_graph_behind() -> None:
    apart = APART(convolutional(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True), 2)
    for take in (two_passes, one_pass):
        take(apart)
        assert not any(part.requires_grad for shift in apart.perturbation.values() for part in shift)
        copy.deepcopy(apart)


# Samples.


class Graphs:
    """A batch of graphs as one object, of which nobody sees how many there are."""

    def __init__(self) -> None:
        self.nodes, self.graph = torch.randn(12, 4).double(), torch.arange(4).repeat_interleave(3)


class OfGraphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, graphs: Graphs) -> Tensor:
        h = self.norm(graphs.nodes)
        return self.head(torch.zeros(4, 4).double().index_add(0, graphs.graph, h))


class WithAdjacency(OfGraphs):
    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.head(self.norm((adjacency @ x).flatten(0, 1)).view(x.shape).mean(1))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (OfGraphs().double(), (Graphs(),)),
        (WithAdjacency().double(), (torch.randn(4, 3, 4).double(), torch.eye(3).double())),
    ],
    ids=["an opaque object", "tensors of unlike lengths"],
)
@pytest.mark.parametrize("rows", [None, "consecutive"])
def test_inputs_that_do_not_say_how_many_samples_there_are_are_refused_in_groups(model, inputs, rows):
    for groups in (2, -1):
        with (
            pytest.raises(BatchError, match=r"layer 'norm'.*does not say how many samples.*rows=function"),
            APART(model, 0.3, groups, rows=rows).one_pass(),
        ):
            model(*inputs)
    by_function = APART(model, 0.3, 2, rows=lambda layer, x: torch.arange(len(x)) // 3)
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        with by_function.one_pass():
            outputs.append(model(*inputs).detach())
    moved = (outputs[0] - outputs[1]).abs().amax(1) > 1e-12
    assert moved.tolist() == [False, True, False, True]


def test_the_calls_of_a_context_may_be_batches_of_unlike_sizes() -> None:
    """Labelled and unlabelled samples, each call in groups of its own."""
    model = convolutional()
    (x, y), (u, _) = images(), images(24, seed=2)
    apart = APART(model, 0.3, 4)
    with apart.one_pass():
        (F.cross_entropy(model(x), y) - model(u).softmax(1).square().sum(1).mean()).backward()
    assert apart.stats["1"].mean.shape == (2, 4)
    assert model[1].num_batches_tracked == 2


def test_a_method_other_than_forward_is_in_groups_of_the_samples_that_a_part_of_the_model_sees() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutional()

        def features(self, x: Tensor) -> Tensor:
            return self.body(x)

    own, expected = Features(), APART(convolutional(), 0.3, 2)
    torch.manual_seed(0)
    with APART(own, 0.3, 2).one_pass():
        F.cross_entropy(own.features(BATCH[0]), BATCH[1]).backward()
    one_pass(expected)
    assert_same_training(own.body, expected.model)


# Checkpoints that keep some results.

aten = torch.ops.aten


@every_form
@pytest.mark.parametrize("kept", [{aten.convolution.default}, {aten.tanh.default, aten.rsqrt.default, aten.mul.Tensor}])
def test_selective_checkpoints_change_no_number(take: Any, kept: set[Any]) -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)

    plain = convolutional()
    for place in (2, 5):
        plain[place] = nn.ReLU()  # selective checkpoints allow no in-place change of what they keep
    own = Selective(*copy.deepcopy(plain))
    take(APART(own, 0.3, 2))
    take(APART(plain, 0.3, 2))
    assert_same_training(own, plain)


def test_gradients_that_are_filled_with_zeros_between_the_contexts_are_missed() -> None:
    apart = APART(convolutional())
    with apart.to_proxy():
        loss_of(apart.model).backward()
    apart.model.zero_grad(set_to_none=False)
    with pytest.raises(UsageError, match=r"zero_grad\(\) was called between"), apart.to_adver():
        pytest.fail("entered")


def test_a_proxy_context_in_which_nothing_was_differentiated_is_said_to_lack_its_backward() -> None:
    apart = APART(convolutional())
    with apart.to_proxy(), torch.no_grad():
        apart.model(BATCH[0])
    with pytest.raises(UsageError, match=r"no backward\(\) since"), apart.to_adver():
        pytest.fail("entered")
