"""What reaches past the arguments of a step: it gets its right gradient, or is named before anything has changed."""

from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import both_passes, gradients
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from apart_func import (
    APART,
    ApartError,
    UsageError,
    adversarial_pass,
    functionalize,
    grad_and_value,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    mixed_pass,
    proxy_pass,
    split_state,
)

BATCH = images()


def two_passes(model: nn.Module, loss_fn: Any) -> Any:
    return make_apart_step(model, loss_fn, epsilon=0.0, groups=2)(*split_state(model), BATCH)


def one_pass(model: nn.Module, loss_fn: Any) -> Any:
    step = make_one_pass_step(model, loss_fn, epsilon=0.1, groups=2)
    return step(*split_state(model), BATCH, init_perturbation(model))


def parts(model: nn.Module, loss_fn: Any) -> Any:
    return proxy_pass(functionalize(model), loss_fn, *split_state(model), BATCH)


def mapped(model: nn.Module, loss_fn: Any) -> Any:
    """Two passes under vmap, over copies of the parameters."""
    step = make_apart_step(model, loss_fn, epsilon=0.0, groups=2)
    params, buffers = split_state(model)
    twice = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    return vmap(lambda p: step(p, buffers, BATCH))(twice)


WAYS = {"two passes": two_passes, "one pass": one_pass, "proxy pass": parts, "mapped": mapped}
every_way = pytest.mark.parametrize("way", WAYS)


def refused(way: str, model: nn.Module, loss_fn: Any, message: str) -> str:
    """The call ends in an error that says `message`, and neither the model nor its gradients are touched."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=message) as raised:
        WAYS[way](model, loss_fn)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    return str(raised.value)


# Parameters in a loss.


@every_way
def test_a_regulariser_over_the_parameters_of_the_model_is_refused_by_their_names(way: str) -> None:
    model = convolutional()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 1e-2 * sum(p.square().sum() for p in model.parameters())

    message = refused(way, model, loss_fn, r"past the arguments.*inside the model's")
    assert all(repr(name) in message for name, _ in model.named_parameters())


class Tempered(nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self, is_trained: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5).double(), requires_grad=is_trained)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output / self.temperature, target)


@every_way
def test_a_criterion_with_parameters_of_its_own_is_refused_by_their_names(way: str) -> None:
    criterion = Tempered(is_trained=True)
    refused(way, convolutional(), criterion, r"'loss_fn.temperature'.*criterion with parameters of its own")
    assert criterion.temperature.grad is None


@every_way
def test_a_parameter_that_is_of_nothing_is_refused_by_its_shape(way: str) -> None:
    stray = nn.Parameter(torch.ones(7).double())
    refused(way, convolutional(), lambda o, t: F.cross_entropy(o, t) + stray.sum(), r"one of shape \(7,\)")


@every_way
def test_a_frozen_criterion_is_a_function_like_any_other(way: str) -> None:
    found = WAYS[way](convolutional(), Tempered(is_trained=False))
    expected = WAYS[way](convolutional(), lambda o, t: F.cross_entropy(o / 1.5, t))
    torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)


@every_way
def test_a_regulariser_that_is_detached_or_of_a_teacher_changes_the_loss_alone(way: str) -> None:
    model, teacher = convolutional(), convolutional().eval()

    def distilled(output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            goal = teacher(BATCH[0]).softmax(1).mean(0)
        size = sum(p.detach().square().sum() for p in model.parameters())
        return F.cross_entropy(output, target) - (output.log_softmax(1).mean(0) * goal).sum() + size

    goal = teacher(BATCH[0]).detach().softmax(1).mean(0)
    found = WAYS[way](model, distilled)
    expected = WAYS[way](model, lambda o, t: F.cross_entropy(o, t) - (o.log_softmax(1).mean(0) * goal).sum())
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=1e-15)
    size = sum(p.detach().square().sum() for p in model.parameters())
    torch.testing.assert_close(found.loss - expected.loss, size.expand_as(found.loss))


def test_the_regulariser_that_the_error_recommends_inside_the_forward_has_its_right_gradient() -> None:
    def forward(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return model.body(x), sum(p.square().sum() for p in model.body.parameters())

    model = Parts(forward, body=convolutional())
    out = two_passes(model, lambda o, t: F.cross_entropy(o[0], t) + 0.1 * o[1])
    plain = two_passes(model, lambda o, t: F.cross_entropy(o[0], t))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(out.grads[name] - plain.grads[name], 0.2 * parameter.detach(), rtol=1e-9, atol=1e-12)


def test_in_the_drop_in_a_regulariser_over_the_parameters_has_its_right_gradient() -> None:
    """There the parameters are the model's own, so nothing is past any argument."""
    found = []
    for weight in (0.0, 0.1):
        model = convolutional()

        def size(o: Tensor, t: Tensor, model: nn.Module = model, weight: float = weight) -> Tensor:
            return F.cross_entropy(o, t) + weight * sum(p.square().sum() for p in model.parameters())

        both_passes(APART(model, 0.1, 2), BATCH, loss_fn=size)
        found.append(gradients(model))
    for name, parameter in convolutional().named_parameters():
        torch.testing.assert_close(found[1][name] - found[0][name], 0.2 * parameter.detach(), rtol=1e-9, atol=1e-12)


# Parameters in hooks and functions on the model.


@every_way
def test_a_hook_that_closes_over_a_parameter_is_refused_by_its_name(way: str) -> None:
    model = convolutional()
    bias = model[8].bias
    model[5].register_forward_hook(lambda layer, inputs, output: output * bias.sum())
    refused(way, model, F.cross_entropy, r"'8.bias'")


def twice_by_closure(layer: nn.Module) -> Any:
    original = layer.forward
    return lambda x: 2 * original(x)


def twice_by_default(layer: nn.Module) -> Any:
    def forward(x: Tensor, module: nn.Module = layer) -> Tensor:
        return 2 * nn.Linear.forward(module, x)

    return forward


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return 2 * nn.Linear.forward(layer, x)


@pytest.mark.parametrize(
    "forward", [partial(partial, twice), lambda layer: MethodType(twice, layer), twice_by_closure, twice_by_default]
)
def test_a_forward_that_holds_a_layer_is_copied_with_it_and_refused_with_one_of_no_model(forward: Any) -> None:
    model, plain = convolutional(), convolutional()
    model[8].forward = forward(model[8])
    found, expected = two_passes(model, F.cross_entropy), two_passes(plain, lambda o, t: F.cross_entropy(2 * o, t))
    torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)
    model[8].forward = forward(nn.Linear(5, 3).double())
    with pytest.raises(
        ApartError, match=r"the forward of layer '8' \(Linear\) is a function that holds|of shape \(3, 5\)"
    ):
        two_passes(model, F.cross_entropy)


def test_a_forward_that_holds_no_module_is_used() -> None:
    model, plain = convolutional(), convolutional()
    model[5].forward = lambda x: F.silu(x)
    plain[5] = nn.SiLU()
    torch.testing.assert_close(
        two_passes(model, F.cross_entropy)._asdict(), two_passes(plain, F.cross_entropy)._asdict(), rtol=0, atol=0
    )


def test_a_hook_that_is_a_method_of_a_module_in_the_model_runs_on_the_copys_module() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutional()
            self.register_buffer("calls", torch.zeros(()))
            self.body.register_forward_hook(self.count)

        def count(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.calls += 1

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Counting().double()
    out = two_passes(model, F.cross_entropy)
    assert out.buffers["calls"] == 1
    assert model.calls == 0


def test_a_hook_object_is_the_users_own() -> None:
    class Watch:
        def __init__(self) -> None:
            self.shapes: list[torch.Size] = []

        def __call__(self, module: nn.Module, *rest: Any) -> None:
            self.shapes.append(rest[-1][0].shape if isinstance(rest[-1], tuple) else rest[-1].shape)

    model = convolutional()
    watches = [Watch() for _ in range(3)]
    model[4].register_forward_hook(watches[0])
    model[4].register_forward_pre_hook(watches[1])
    model[3].register_full_backward_hook(watches[2])
    two_passes(model, F.cross_entropy)
    assert [len(watch.shapes) for watch in watches] == [2, 2, 2]


# Losses without a graph, and inside a model.


@pytest.mark.parametrize("way", ["two passes", "one pass", "proxy pass"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, t: F.cross_entropy(o, t).detach(),
        lambda o, t: F.cross_entropy(o.detach(), t),
        lambda o, t: torch.tensor(1.0).double(),
        torch.no_grad()(F.cross_entropy),
    ],
)
def test_a_loss_without_a_graph_is_refused(way: str, loss_fn: Any) -> None:
    refused(way, convolutional(), loss_fn, r"the loss has no graph.*Do not\s+detach")


@pytest.mark.parametrize("take", [adversarial_pass, partial(mixed_pass, groups=2, clean=1)])
def test_every_pass_refuses_a_loss_without_a_graph(take: Any) -> None:
    model = convolutional()
    with pytest.raises(UsageError, match="the loss has no graph"):
        take(functionalize(model), lambda o, t: o.detach().mean(), *split_state(model), BATCH, init_perturbation(model))


def test_a_gradient_of_a_function_that_reaches_past_its_argument_is_refused_too() -> None:
    stray = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match=r"of shape \(2,\)"):
        grad_and_value(lambda p: ((p["a"] * stray).sum(), None), {"a": torch.ones(2)})
    with pytest.raises(UsageError, match="no graph"):
        grad_and_value(lambda p: (p["a"].detach().sum(), None), {"a": torch.ones(2)})
    grads, value, aux = grad_and_value(lambda p: (p["a"].square().sum(), "aux"), {"a": torch.arange(2.0)})
    assert (grads["a"].tolist(), value.item(), aux) == ([0.0, 2.0], 1.0, "aux")


def loss_inside(reduction: str) -> nn.Module:
    """Computes its loss itself, as models of transformers do."""

    def forward(model: Any, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = model.body(pixels)
        return {"loss": F.cross_entropy(logits, labels, reduction=reduction), "logits": logits}

    return Parts(forward, body=convolutional())


LABELLED = {"pixels": BATCH[0], "labels": BATCH[1]}, BATCH[1]


def test_a_loss_that_the_model_computes_trains_in_two_passes_and_is_refused_in_one() -> None:
    model = loss_inside("mean")
    step = make_apart_step(model, lambda output, target: output["loss"], epsilon=0.0, groups=2)
    out, plain = step(*split_state(model), LABELLED), two_passes(model.body, F.cross_entropy)
    torch.testing.assert_close(list(out.grads.values()), list(plain.grads.values()), rtol=0, atol=0)
    step = make_one_pass_step(model, lambda output, target: output["loss"], epsilon=0.1, groups=2)
    with pytest.raises(ApartError, match=r"0-d tensor that depends on parameters.*compute\s+the loss in loss_fn"):
        step(*split_state(model), LABELLED)


def test_losses_of_each_sample_that_the_model_computes_train_in_one_pass() -> None:
    model = loss_inside("none")
    step = make_one_pass_step(model, lambda output, target: output["loss"].mean(), epsilon=0.1, groups=2)
    out = step(*split_state(model), LABELLED, init_perturbation(model))
    expected = one_pass(model.body, F.cross_entropy)
    torch.testing.assert_close(list(out.grads.values()), list(expected.grads.values()), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(out.loss, expected.loss)


def test_a_temperature_that_the_output_brings_along_without_a_gradient_is_passed_whole() -> None:
    model = Parts(lambda m, x: (m.body(x), torch.tensor(2.0).double()), body=convolutional())
    out = one_pass(model, lambda o, t: F.cross_entropy(o[0] / o[1], t))
    expected = one_pass(model.body, lambda o, t: F.cross_entropy(o / 2, t))
    torch.testing.assert_close(list(out.grads.values()), list(expected.grads.values()))


def test_a_step_after_one_that_was_refused_is_as_if_it_had_not_been() -> None:
    model = convolutional()
    bad, state = nn.Parameter(torch.ones(1).double()), tree_map(torch.clone, split_state(model))
    use = [True]
    step = make_apart_step(model, lambda o, t: F.cross_entropy(o, t) + (bad.sum() if use[0] else 0), groups=2)
    with pytest.raises(UsageError):
        step(*state, BATCH)
    use[0] = False
    expected = make_apart_step(model, F.cross_entropy, groups=2)(*state, BATCH)
    torch.testing.assert_close(step(*state, BATCH)._asdict(), expected._asdict(), rtol=0, atol=0)
