"""Trees: whatever holds tensors as input and output; layers that come and go; and `all_finite`."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import STEPS, more_of
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.func import vmap

from apart_func import (
    Perturbation,
    StatGrads,
    StepOutput,
    adversarial_pass,
    all_finite,
    functionalize,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)
from apart_func.trees import SMALL_NUMEL

X, Y = images()


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def both_steps(model: nn.Module, batch: Any, loss_fn: Any = F.cross_entropy, **options: Any) -> list[StepOutput]:
    return [
        make_apart_step(model, loss_fn, epsilon=0.1, groups=2, ratio=0.5, **options)(*split_state(model), batch),
        make_one_pass_step(model, loss_fn, epsilon=0.1, groups=2, **options)(
            *split_state(model), batch, init_perturbation(model)
        ),
    ]


def numbers(out: StepOutput) -> list[Any]:
    """What a step computes, without the names of a wrapper around the model."""
    trees = out.grads, out.buffers, out.stats, out.stat_grads, out.perturbation
    return [out.loss, out.adversarial_loss, *(list(tree.values()) for tree in trees)]


# Inputs. Targets are in models/test_samples.py.


def keyed() -> nn.Module:
    """A model of keywords, of which one is no tensor."""
    return Parts(lambda m, images, name="": m.body(images), body=convolutional())


class Cache(UserDict[str, Any]):
    """As `BatchEncoding` and `BatchFeature` are."""


INPUTS = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "dict": {"images": X},
    "OrderedDict": OrderedDict(images=X),
    "UserDict": UserDict(images=X),
    "a subclass of UserDict": Cache(images=X),
    "with a string": {"images": X, "name": "batch 3"},
    "with None": {"images": X, "name": None},
    "a mapping that cannot be written to": MappingProxyType({"images": X}),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_input_is_splatted_or_passed_by_keywords_whatever_sequence_or_mapping_it_is(kind, microbatches):
    plain = both_steps(convolutional(), (X, Y), microbatches=microbatches)
    found = both_steps(keyed(), (INPUTS[kind], Y), microbatches=microbatches)
    for one, other in zip(found, plain, strict=True):
        assert_equal(numbers(one), numbers(other))


# Outputs.


@dataclass
class Output:
    logits: Tensor
    name: str = "head"
    hidden: Any = None


Pair = namedtuple("Pair", "logits name")


def wrapped(wrap: Any) -> nn.Module:
    return Parts(lambda m, x: m.wrap(m.body(x)), body=convolutional(), wrap=wrap)


OUTPUTS: dict[str, tuple[Any, Any]] = {
    "dataclass": (Output, lambda o: o.logits),
    "nested dataclass": (lambda z: Output(z, hidden={"z": [2 * z]}), lambda o: o.hidden["z"][0] / 2),
    "namedtuple": (lambda z: Pair(z, 3), lambda o: o.logits),
    "dict with a string": (lambda z: {"z": z, "k": "v"}, lambda o: o["z"]),
    "list with None": (lambda z: [None, z], lambda o: o[1]),
    "UserDict": (lambda z: UserDict(z=z, k=None), lambda o: o["z"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_output_comes_back_in_its_container_with_what_is_no_tensor(kind: str, microbatches: int) -> None:
    wrap, logits = OUTPUTS[kind]
    expected = both_steps(convolutional(), (X, Y), microbatches=microbatches)
    found = both_steps(wrapped(wrap), (X, Y), lambda o, t: F.cross_entropy(logits(o), t), microbatches=microbatches)
    for one, other in zip(found, expected, strict=True):
        assert_equal(numbers(one), numbers(other))
        assert type(one.output) is type(wrap(Y))
        assert_equal(logits(one.output), other.output)
        assert not logits(one.output).requires_grad
    strings = {"dataclass": lambda o: o.name, "namedtuple": lambda o: o.name, "dict with a string": lambda o: o["k"]}
    if kind in strings:
        assert strings[kind](found[0].output) == strings[kind](wrap(Y))


def test_no_container_that_the_caller_passes_is_changed() -> None:
    inputs, target = Cache(images=X, name="batch"), Output(Y)
    both_steps(keyed(), (inputs, target), lambda o, t: F.cross_entropy(o, t.logits), microbatches=2)
    assert inputs == {"images": X, "name": "batch"}
    assert target.logits is Y


@pytest.mark.parametrize("kind", ["dataclass", "namedtuple", "dict with a string"])
def test_containers_pass_through_transforms(kind: str) -> None:
    wrap, logits = OUTPUTS[kind]
    model = wrapped(wrap)
    step = make_apart_step(model, lambda o, t: F.cross_entropy(logits(o), t))
    eager = step(*split_state(model), (X, Y))
    mapped = vmap(lambda x: step(*split_state(model), (x, Y)).grads)(X[None])
    torch.testing.assert_close({k: g[0] for k, g in mapped.items()}, eager.grads, rtol=1e-9, atol=1e-12)


# Layers that the forward calls now and then.


def skipping() -> nn.Module:
    """One of two layers sees a batch, by the sign of its mean."""

    def forward(model: Any, x: Tensor) -> Tensor:
        layer = model.a if x.mean() > 0 else model.b
        return model.head(layer(x).mean((2, 3)) + x.square().mean((2, 3)))

    torch.manual_seed(0)
    return Parts(forward, a=nn.BatchNorm2d(2), b=nn.BatchNorm2d(2), head=nn.Linear(2, 3))


SKIPPING_X = torch.cat([X.abs(), -X.abs()])
SKIPPING_Y = torch.cat([Y, Y])


def carried(model: nn.Module) -> dict[str, Perturbation]:
    return {name: Perturbation(shift.mean + 0.1, shift.scale - 0.1) for name, shift in init_perturbation(model).items()}


def test_statistics_of_microbatches_are_those_of_the_ones_that_a_layer_saw() -> None:
    model = skipping()
    step = make_apart_step(model, F.cross_entropy, microbatches=4)
    out = step(*split_state(model), (SKIPPING_X, SKIPPING_Y))
    for name, part in (("a", SKIPPING_X[:8]), ("b", SKIPPING_X[8:])):
        halves = torch.stack([half.mean((0, 2, 3)) for half in part.split(4)])
        torch.testing.assert_close(out.stats[name].mean, halves)
        assert out.buffers[f"{name}.num_batches_tracked"] == 2
        assert out.perturbation[name].mean.shape == (4, 2)  # zero where the layer was not called
    assert not out.perturbation["a"].mean[2:].any()
    assert not out.perturbation["b"].scale[:2].any()
    assert out.perturbation["a"].scale[:2].all()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_perturbation_of_a_layer_that_one_pass_does_not_call_is_kept(microbatches: int) -> None:
    model = skipping()
    given = carried(model)
    options: dict[str, Any] = {"epsilon": 0.3, "groups": 2, "rule": sign_perturbation}
    step = make_one_pass_step(model, F.cross_entropy, microbatches=microbatches, **options)
    out = step(*split_state(model), (X.abs(), Y), given)
    assert_equal(out.perturbation["b"], given["b"])
    assert torch.equal(out.perturbation["a"].scale.abs(), torch.full((2,), 0.3, dtype=torch.float64))
    assert "b" not in out.stats
    assert not out.stat_grads["b"].mean.any()


def test_a_layer_that_one_microbatch_skips_is_perturbed_by_those_that_saw_it() -> None:
    model = skipping()
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.3, groups=2, microbatches=2, rule=sign_perturbation)
    out = step(*split_state(model), (SKIPPING_X, SKIPPING_Y), carried(model))
    for name in ("a", "b"):
        assert torch.equal(out.perturbation[name].scale, 0.3 * out.stat_grads[name].scale.sum(0).sign())


def test_a_rule_sees_no_layer_that_was_skipped_nor_needs_to() -> None:
    model = skipping()
    seen: list[set[str]] = []

    def by_statistics(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        seen.append(set(stat_grads))
        assert stats.keys() == stat_grads.keys()  # so a rule may look up the statistics of every layer
        return sign_perturbation(stats, stat_grads, epsilon)

    out = make_apart_step(model, F.cross_entropy, rule=by_statistics)(*split_state(model), (X.abs(), Y))
    assert seen == [{"a"}]
    assert not out.perturbation["b"].mean.any()
    again = make_apart_step(model, F.cross_entropy, rule=sign_perturbation)(*split_state(model), (X.abs(), Y))
    assert again.all_finite
    assert not again.perturbation["b"].scale.any()


# Names.


def test_a_shift_of_the_scale_also_goes_by_the_name_of_the_variance() -> None:
    for kind in (Perturbation, StatGrads):
        pair = kind(torch.zeros(2), torch.ones(2))
        assert pair.var is pair.scale
        assert pair._fields == ("mean", "scale")
        with pytest.raises(AttributeError):
            pair.var = torch.zeros(2)  # type: ignore[misc]


# all_finite.

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", [1, 7, SMALL_NUMEL, SMALL_NUMEL + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_one_value_that_is_not_finite_is_found_in_tensors_of_any_size_and_dtype(bad, size, dtype):
    for place in {0, size // 2, size - 1}:
        tensor = torch.ones(size, dtype=dtype)
        others = [torch.ones(3), torch.ones(SMALL_NUMEL + 3, dtype=torch.float64)]
        assert all_finite([others[0], tensor, others[1]])
        tensor[place] = complex(0, bad) if dtype.is_complex else bad
        assert not all_finite([others[0], tensor, others[1]])
        assert not vmap(lambda t: all_finite([torch.ones(1), t]))(tensor[None]).any()


def test_the_largest_numbers_of_a_dtype_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limit = torch.finfo(dtype).max
        for size in (2, SMALL_NUMEL + 2):
            assert all_finite([torch.full((size,), limit, dtype=dtype), torch.full((size,), -limit, dtype=dtype)])


def test_of_tensors_with_both_infinities_neither_hides_the_other() -> None:
    for size in (2, SMALL_NUMEL + 2):
        tensor = torch.zeros(size)
        tensor[0], tensor[1] = float("inf"), float("-inf")
        assert not all_finite([tensor])


@pytest.mark.parametrize("tensors", [[], [torch.zeros(0)], [torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.cfloat)]])
def test_nothing_at_all_is_finite(tensors: list[Tensor]) -> None:
    assert all_finite(tensors)
    assert all_finite(tensors).shape == ()
    assert all_finite(iter(tensors)).dtype == torch.bool
    assert vmap(lambda x: all_finite([*tensors, x[:0]]))(torch.ones(2, 1)).all()


def test_it_has_no_graph() -> None:
    found = all_finite([torch.ones(2, requires_grad=True)])
    assert not found.requires_grad


def rule_that_hides(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
    return {layer: Perturbation(0 * g.mean.nan_to_num(), 0 * g.scale.nan_to_num()) for layer, g in stat_grads.items()}


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient for the bias of a batch norm is NaN where nothing else's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("nan"))


@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_statistic_gradients_that_are_not_finite_are_seen_where_all_else_is(kind: str) -> None:
    """Parameters before the layer are frozen, so that its own NaN reaches no gradient but that of its statistics."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.body(X[: len(x)]) + 0 * Poisoned.apply(model.norm(x).mean((1, 2, 3)))[:, None]

    model = Parts(forward, norm=nn.BatchNorm2d(2, affine=False), body=convolutional())
    params, buffers = split_state(model)
    if kind == "two passes":
        out = make_apart_step(model, F.cross_entropy, rule=rule_that_hides)(params, buffers, (X, Y))
    else:
        step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2, rule=rule_that_hides)
        out = step(params, buffers, (X, Y), init_perturbation(model))
    finite = [out.loss, out.adversarial_loss, *out.grads.values(), *out.perturbation["norm"]]
    assert all(tensor.isfinite().all() for tensor in finite)
    assert not out.stat_grads["norm"].mean.isfinite().all()
    assert not out.all_finite
    assert_equal(out.buffers, buffers)


@pytest.mark.parametrize("bad", BAD)
def test_a_perturbation_that_is_not_finite_is_seen_and_never_carried(bad: float) -> None:
    model = convolutional()
    given = carried(model)
    wrong = [True]

    def rule(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        found = sign_perturbation(stats, stat_grads, epsilon)
        return {**found, "4": found["4"]._replace(mean=torch.full((5,), bad).double())} if wrong[0] else found

    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2, rule=rule)
    out = step(*split_state(model), (X, Y), given)
    assert not out.all_finite
    assert_equal(out.perturbation, given)
    assert_equal(out.buffers, split_state(model)[1])
    two_passes = make_apart_step(model, F.cross_entropy, rule=rule)
    assert not two_passes(*split_state(model), (X, Y)).all_finite
    wrong[0] = False
    assert step(*split_state(model), (X, Y), out.perturbation).all_finite


def test_a_perturbation_that_is_not_finite_is_seen_where_the_output_of_its_layer_is_used_by_nobody() -> None:
    parts = {"norm": nn.BatchNorm2d(2, affine=False), "body": convolutional()}
    model = Parts(lambda m, x: (m.norm(x), m.body(x))[1], **parts)
    bad = Perturbation(torch.tensor([0.1, float("nan")]).double(), torch.zeros(2).double())
    step = make_apart_step(model, F.cross_entropy, rule=lambda *a: {**sign_perturbation(*a), "norm": bad})
    out = step(*split_state(model), (X, Y))
    assert all(tensor.isfinite().all() for tensor in (out.loss, out.adversarial_loss, *out.grads.values()))
    assert not out.all_finite


# Radii of which some are none.


@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_a_radius_of_one_or_more_under_a_rule_of_signs_is_seen_where_it_cannot_be_refused(kind: str) -> None:
    model = convolutional()
    step, state, more = STEPS[kind](model), split_state(model), more_of(kind, model)
    radii = torch.tensor([0.5, 0.999, 1.0, 1.5, float("nan"), float("inf"), -0.1]).double()
    out = vmap(lambda e: step(*state, (X, Y), *more, epsilon=e))(radii)
    if kind == "one pass":
        assert_equal(out.perturbation["4"].mean[2:], more[0]["4"].mean.expand(5, -1))
    assert out.all_finite.tolist() == [True, True, False, False, False, False, False]
    assert_equal(out.buffers["1.running_mean"][2:], state[1]["1.running_mean"].expand(5, -1))


def test_of_another_rule_any_radius_is_taken() -> None:
    model = convolutional()

    def halved(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        return sign_perturbation(stats, stat_grads, epsilon / 100)

    step = make_apart_step(model, F.cross_entropy, epsilon=30.0, rule=halved)
    assert step(*split_state(model), (X, Y)).all_finite
    assert vmap(lambda e: step(*split_state(model), (X, Y), epsilon=e))(torch.tensor([40.0])).all_finite


def test_the_pass_itself_takes_any_perturbation() -> None:
    """|δσ| < 1 is a promise of rules; what a user shifts by hand is theirs."""
    model = convolutional()
    shifts = {name: Perturbation(shift.mean + 2, shift.scale - 3) for name, shift in init_perturbation(model).items()}
    out = adversarial_pass(functionalize(model), F.cross_entropy, *split_state(model), (X, Y), shifts)
    assert out.loss.isfinite()
