"""The drop-in: its numbers against the definition, and what it leaves of the user's model."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from agreement import assert_agree, take_step
from loops import both_passes, drop_in_step
from small import Counting, Parts, convolutional, images
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from apart_func import APART, ApartError, Perturbation, make_apart_step, split_state

# Rounding of float64 in another order, through two layers.
ROUNDING = {"rtol": 1e-11, "atol": 1e-14}


compare = partial(take_step, take=drop_in_step)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a context must not change: values, identities, order, attributes, hooks."""
    return {
        "keys": list(model.state_dict()),
        "tensors": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [module.forward for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "parameter hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
    }


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The numbers.


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])  # norm-act layers; batch norm and in-place ReLU
def test_a_timm_network_steps_as_the_definition_says(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double()
    batch = torch.randn(8, 3, 32, 32).double(), torch.randint(3, (8,))
    step = compare(model, batch, groups=2)
    assert_agree(step)
    assert {int(n) for key, n in step.library.buffers.items() if key.endswith("num_batches_tracked")} == {1}


def test_layers_may_be_called_in_another_order_than_they_are_registered_in() -> None:
    torch.manual_seed(0)
    parts = {"second": nn.BatchNorm1d(5), "first": nn.BatchNorm1d(5), "head": nn.Linear(5, 3)}
    model = Parts(lambda m, x: m.head(m.second(x * m.first(x).tanh())), **parts)
    for norm in (model.first, model.second):
        nn.init.normal_(norm.weight)
    batch = torch.randn(12, 5).double(), torch.randint(3, (12,))
    functional = make_apart_step(model, F.cross_entropy, groups=3)(*split_state(copy.deepcopy(model)), batch)
    step = compare(model, batch, groups=3)
    assert_agree(step)
    # the drop-in does not keep the statistics of its second pass
    found, expected = ({**out._asdict(), "adversarial_stats": {}} for out in (step.library, functional))
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_the_perturbation_of_every_step_starts_from_zero() -> None:
    # The original adds the adversarial gradient of one step to the statistic gradients of the next.
    model, batch = convolutional(), images()
    once = APART(model, groups=2)
    both_passes(once, batch)
    many = APART(model, groups=2)
    for seed in range(3):
        both_passes(many, images(seed=seed + 10))
    both_passes(many, batch)
    torch.testing.assert_close(many.stat_grads, once.stat_grads, rtol=0, atol=0)
    torch.testing.assert_close(many.perturbation, once.perturbation, rtol=0, atol=0)


def test_several_forwards_in_a_context_are_one_pass() -> None:
    model, (x, y) = convolutional(), images()
    apart, stat_grads = APART(model), []
    halves = [slice(0, 4), slice(4, 8)]
    for parts in ([halves[0]], [halves[1]], halves):
        with apart.to_proxy():
            for part in parts:
                F.cross_entropy(model(x[part]), y[part]).backward()
        assert apart.stats["1"].mean.shape == ((4,) if len(parts) == 1 else (2, 4))
        with apart.to_adver():
            model(x)
        stat_grads.append(apart.stat_grads["4"].scale)
    torch.testing.assert_close(stat_grads[2], stat_grads[0] + stat_grads[1], **ROUNDING)


def test_a_new_radius_holds_from_the_next_adversarial_pass_on() -> None:
    model, batch = convolutional(), images()
    apart = APART(model)
    assert apart.epsilon == 0.1
    for epsilon in (0.3, torch.tensor(0.2), 0.0):
        apart.set_epsilon(epsilon)
        both_passes(apart, batch)
        radius = apart.perturbation["4"].scale.abs().max()
        torch.testing.assert_close(radius, torch.as_tensor(epsilon, dtype=torch.float64), rtol=0, atol=0)


def test_another_rule_takes_the_place_of_the_sign() -> None:
    def halved(stats: Any, stat_grads: Any, epsilon: Tensor) -> dict[str, Perturbation]:
        return {layer: Perturbation(epsilon * g.mean, stats[layer].var) for layer, g in stat_grads.items()}

    apart = APART(convolutional(), epsilon=0.5, rule=halved)
    both_passes(apart, images())
    torch.testing.assert_close(apart.perturbation["1"].mean, 0.5 * apart.stat_grads["1"].mean, rtol=0, atol=0)
    torch.testing.assert_close(apart.perturbation["1"].scale, apart.stats["1"].var, rtol=0, atol=0)


# What is left of the user's model.


@pytest.mark.parametrize("build", [convolutional, lambda: timm.create_model("test_efficientnet").double()])
def test_outside_the_contexts_the_model_is_as_the_user_made_it(build: Callable[[], nn.Module]) -> None:
    model = build()
    channels = next(model.parameters()).shape[1]
    x = torch.randn(4, channels, 32, 32).double()
    before = state_of(model)
    apart = APART(model, groups=2)
    assert state_of(model) == before
    assert not hasattr(apart, "state_dict")  # it has nothing to save
    for context in (apart.to_proxy, apart.to_adver, apart.one_pass):
        with context():
            model(x).logsumexp(1).mean().backward()
        assert state_of(model) == before


def test_after_a_step_the_model_can_be_copied_pickled_and_evaluated() -> None:
    model, batch = convolutional(), images()
    apart = APART(model)
    both_passes(apart, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.eval()
        torch.testing.assert_close(twin(batch[0]), model.eval()(batch[0]), rtol=0, atol=0)
        model.train()
    apart, model = copy.deepcopy((apart, model))  # the copied contexts are those of the copied model
    both_passes(apart, batch)
    assert apart.model is model


def test_the_adversarial_pass_moves_no_buffer() -> None:
    torch.manual_seed(0)
    layers = [spectral_norm(nn.Conv2d(2, 2, 3)), BatchNormAct2d(2), Counting(), convolutional()]
    model, (x, y) = nn.Sequential(*layers).double(), images()
    apart = APART(model)
    with apart.to_proxy():
        F.cross_entropy(model(x), y).backward()
    values, tensors = values_of(model), [id(buffer) for buffer in model.buffers()]
    with apart.to_adver():
        F.cross_entropy(model(x), y).backward()
        assert model[2].in_place == 2  # the forward sees what it did
    torch.testing.assert_close(values_of(model), values, rtol=0, atol=0)
    assert [id(buffer) for buffer in model.buffers()] == tensors
    assert model[2].in_place == model[2].replaced == model[1].num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_running_statistics_are_those_of_plain_training(norm: type[nn.Module], momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model[1].momentum = momentum
    plain, apart = copy.deepcopy(model), APART(model)
    for seed in range(3):
        both_passes(apart, images(seed=seed))
        plain(images(seed=seed)[0])
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), **ROUNDING)


class UserError(Exception):
    """A user's own error."""


def fail(model: nn.Module, x: Tensor | None = None) -> None:
    if x is not None:
        model(x)
    raise UserError


def test_a_buffer_that_a_forward_gives_a_graph_moves_in_the_proxy_pass_alone() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.total = m.total + m.body[8].weight.sum()
        return m.body(x)

    model = Parts(forward, body=convolutional())
    model.register_buffer("total", torch.zeros((), dtype=torch.float64))
    both_passes(APART(model), images())
    torch.testing.assert_close(model.total, model.body[8].weight.sum(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:to_proxy.. was entered again with no to_adver:UserWarning")
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("failing", ["to_proxy", "to_adver"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5), BatchNormAct2d(5, apply_act=False)])
def test_an_exception_inside_a_context_leaves_the_model_as_plain_training_would(norm, failing, after_forward):
    model, (x, y) = convolutional(), images()
    model[4] = copy.deepcopy(norm).double()
    apart = APART(model)
    if failing == "to_adver":
        with apart.to_proxy():
            F.cross_entropy(model(x), y).backward()
    plain, before = copy.deepcopy(model), state_of(model)
    with pytest.raises(UserError), getattr(apart, failing)():
        fail(model, x if after_forward else None)
    assert state_of(model) == before
    if failing == "to_proxy" and after_forward:
        plain(x)  # a forward moves running statistics, whatever comes after it; an adversarial pass moves none
    torch.testing.assert_close(values_of(model), values_of(plain), **ROUNDING)
    both_passes(apart, (x, y))


def test_an_adversarial_pass_that_failed_can_be_tried_again() -> None:
    model, (x, y) = convolutional(), images()
    apart = APART(model, groups=3)
    with apart.to_proxy():
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(ApartError), apart.to_adver():
        model(x)
    with apart.to_adver():
        F.cross_entropy(model(x[:6]), y[:6]).backward()


def test_a_forward_that_the_user_put_on_a_layer_stays_and_is_used() -> None:
    model, (x, y) = convolutional(), images()
    layer, calls = model[1], []

    def own(x: Tensor) -> Tensor:
        calls.append(x)
        return nn.BatchNorm2d.forward(layer, x)

    layer.forward = own
    step = drop_in_step(model, (x, y))
    assert layer.forward is own
    assert len(calls) == 2
    torch.testing.assert_close(step.grads, drop_in_step(convolutional(), (x, y)).grads, rtol=0, atol=0)


# Mistakes.


def proxy(apart: APART, samples: int = 8) -> None:
    x, y = images(samples)
    with apart.to_proxy():
        F.cross_entropy(apart.model(x), y).backward()


# What an adversarial pass refuses leaves its proxy pass unused, which the next to_proxy() says.
unused = pytest.mark.filterwarnings("ignore:to_proxy.. was entered again with no to_adver:UserWarning")


def only_forward(apart: APART) -> None:
    with apart.to_proxy():
        apart.model(images()[0])


def failed(apart: APART) -> None:
    proxy(apart)
    with pytest.raises(UserError), apart.to_proxy():
        fail(apart.model, images()[0])


def proxy_and(change: Callable[[APART], Any]) -> Callable[[APART], None]:
    """A proxy pass, and what changes after it."""

    def happen(apart: APART) -> None:
        proxy(apart)
        change(apart)

    return happen


MISTAKES: dict[str, tuple[Callable[[APART], None], str]] = {
    "no proxy pass": (lambda apart: None, r"no proxy pass since.*with apart.to_proxy"),
    "none since the last": (lambda apart: both_passes(apart, images()), "no proxy pass since the last adversarial one"),
    "one that failed": (failed, "no proxy pass since"),
    "no backward": (only_forward, r"no backward\(\) since the proxy pass.*Call backward\(\)"),
    "cleared gradients": (proxy_and(APART.zero_grad), r"zero_grad\(\) was called between.*before to_proxy\(\)"),
    "another layer": (
        proxy_and(lambda apart: apart.model.__setitem__(4, nn.BatchNorm2d(5).double())),
        r"\['4'\] came, went, or were replaced",
    ),
    "another mode": (
        proxy_and(lambda apart: apart.model[1].eval()),
        r"in training mode are not those.*\['1'\] came or went",
    ),
    "a rule that forgets a layer": (
        proxy_and(lambda apart: setattr(apart, "rule", lambda *_: {})),
        r"the perturbation does not fit.*missing \['1', '4'\]",
    ),
}


@unused
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_adversarial_pass_that_nothing_leads_to_is_refused(mistake: str) -> None:
    apart = APART(convolutional())
    happen, message = MISTAKES[mistake]
    happen(apart)
    with pytest.raises(ApartError, match=message), apart.to_adver():
        pytest.fail("entered")


@unused
@pytest.mark.parametrize("outer", ["to_proxy", "to_adver"])
@pytest.mark.parametrize("inner", ["to_proxy", "to_adver"])
def test_nested_contexts(outer: str, inner: str) -> None:
    apart = APART(convolutional())
    proxy(apart)
    with (
        pytest.raises(ApartError, match=rf"{inner}\(\) was entered inside {outer}\(\)"),
        getattr(apart, outer)(),
        getattr(apart, inner)(),
    ):
        pytest.fail("entered")
    both_passes(apart, images())


def test_a_context_inside_that_of_another_object() -> None:
    model = convolutional()
    outer, inner = APART(model), APART(nn.Sequential(model))
    message = r"layer '0\.1' is inside a context of another APART"
    with pytest.raises(ApartError, match=message), outer.to_proxy(), inner.to_proxy():
        pytest.fail("entered")
    with pytest.raises(ApartError, match="layer '1' is inside a context of another APART"), outer.to_proxy():
        make_apart_step(model, F.cross_entropy)
