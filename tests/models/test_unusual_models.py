"""Models that do with batch norm what some do: read its statistics, have no counter, quantise, checkpoint, freeze."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agree, relative_error, take_step
from forms import STEPS, more_of
from loops import drop_in_step, gradients, in_one_pass, weights
from oracle import oracle_step
from plain import functional_step, plain_step
from small import Parts, convolutional, images, smooth
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from apart_func import (
    APART,
    StateError,
    StepOutput,
    assign_grads_,
    load_state_,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    split_state,
)

BATCH = images()
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}


both_forms = pytest.mark.parametrize("take", [functional_step, drop_in_step])


# Layers without a counter.


@both_forms
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_without_a_counter_is_one_with_it_but_for_the_counter(take, momentum):
    """Checkpoints from before torch 0.4 have none; without one and without momentum, plain PyTorch moves nothing."""
    model, counted, plain = (convolutional(momentum) for _ in range(3))
    for each in (model, plain):
        each[1].num_batches_tracked = None
    out, expected = take(model, BATCH, groups=2), take(counted, BATCH, groups=2)
    for field in ("loss", "adversarial_loss", "grads", "perturbation"):
        torch.testing.assert_close(getattr(out, field), getattr(expected, field), rtol=0, atol=0)
    with warnings.catch_warnings():
        plain(BATCH[0])
    torch.testing.assert_close(out.buffers, dict(plain.named_buffers()), **ROUNDING)


# Models and hooks that read running statistics.


def in_evaluation_mode(model: nn.Module) -> Tensor:
    """The layer itself looks: called once more, in evaluation mode, as self-distillation does."""
    layer = model[1]
    layer.eval()
    y = layer(torch.ones(2, 4, 2, 2).double())
    layer.train()
    return y


# Ways to see the running mean of layer '1' and layer '4' after a forward.
LOOKS: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda model: model[1].running_mean.sum() + model[4].running_var.sum(),
    "getattr": lambda model: getattr(model[1], "running_var").sum(),  # noqa: B009
    "get_buffer": lambda model: model.get_buffer("4.running_mean").sum(),
    "buffers": lambda model: sum(buffer.double().sum() for buffer in model.buffers()),
    "named_buffers": lambda model: dict(model.named_buffers())["1.running_mean"].sum(),
    "state_dict": lambda model: model.state_dict()["4.running_mean"].sum(),
    "register": lambda model: model[1]._buffers["running_mean"].sum(),
    "counter": lambda model: model[4].num_batches_tracked / 2,
    "in evaluation mode": in_evaluation_mode,
}


class Reader(nn.Module):
    """Reads running statistics before and after its layers run, and in a hook, as renormalisation does."""

    def __init__(self, look: str, momentum: float | None) -> None:
        super().__init__()
        self.body, self.look = convolutional(momentum), look
        self.seen: list[Tensor] = []
        self.body[4].register_forward_hook(self.divide)

    def divide(self, layer: Any, inputs: Any, output: Tensor) -> Tensor:
        state = torch.cat([layer.running_mean, layer.running_var, layer.num_batches_tracked[None]])
        self.seen.append(state.detach().clone())
        return output / (1 + layer.running_var.clone().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        before = self.body[1].running_mean.clone()
        y = self.body(x) * LOOKS[self.look](self.body).detach().clone().mean()
        return y * (1 + (self.body[1].running_mean - before).abs().mean())


@both_forms
@pytest.mark.parametrize(
    ("look", "momentum"), [*((look, 0.1) for look in LOOKS), ("attribute", None), ("buffers", 1.0)]
)
def test_whoever_looks_at_running_statistics_sees_those_of_the_calls_so_far_as_in_plain_training(take, look, momentum):
    model, plain = Reader(look, momentum), Reader(look, momentum)
    output = plain(BATCH[0])
    step = take_step(model, BATCH, take, epsilon=0.2, groups=2)
    out = step.library
    torch.testing.assert_close(out.output, output.detach(), **ROUNDING)
    torch.testing.assert_close(out.buffers, dict(plain.named_buffers()), **ROUNDING)
    if take is drop_in_step:
        # the adversarial pass sees what the proxy pass has left, and moves nothing
        torch.testing.assert_close(model.seen, [plain.seen[0]] * 2, **ROUNDING)
    if look != "in evaluation mode":  # the definition normalises whatever the mode is
        assert_agree(step)


@both_forms
def test_a_layer_that_is_called_twice_shows_its_second_call_what_the_first_has_left(take):
    def forward(model: Any, x: Tensor) -> Tensor:
        first = model.norm(x)
        means = model.norm.running_mean.clone()
        return model.head(first * model.norm(2 * x + 1) + means - model.norm.running_mean)

    def twice() -> nn.Module:
        torch.manual_seed(0)
        return Parts(forward, norm=nn.BatchNorm1d(3, momentum=0.5), head=nn.Linear(3, 3))

    batch = torch.randn(8, 3).double(), torch.arange(8) % 3
    out, expected = take(twice(), batch), plain_step(twice(), batch)
    torch.testing.assert_close(out.loss, expected.loss, **ROUNDING)
    torch.testing.assert_close(out.buffers, expected.buffers, **ROUNDING)


def test_in_one_pass_a_forward_reads_the_running_statistics_of_the_clean_samples() -> None:
    parts = {"norm": nn.BatchNorm1d(3, momentum=0.5), "head": nn.Linear(3, 3)}
    model = Parts(lambda m, x: (m.head(m.norm(x)), m.norm.running_mean.expand(len(x), -1).clone()), **parts)
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 3
    step = make_one_pass_step(model, lambda o, t: F.cross_entropy(o[0], t), epsilon=0.1, groups=2)
    out = step(*split_state(model), (x, y))
    torch.testing.assert_close(out.output[1][0], x[::2].mean(0) / 2, **ROUNDING)


# Quantisation-aware training.


def quantised() -> nn.Module:
    """torch.ao's fused convolution and batch norm: the layer is called by a module that rescales by its statistics."""
    import torch.ao.nn.intrinsic.qat as nniqat
    from torch.ao.quantization import get_default_qat_qconfig

    torch.manual_seed(0)
    fused = nniqat.ConvBn2d(2, 4, 3, qconfig=get_default_qat_qconfig("fbgemm", version=0))
    model = nn.Sequential(fused, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)).train()
    model(torch.randn(16, 2, 4, 4))  # observers have seen something, so that they are alike in all passes
    return model


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning")
@both_forms
def test_a_quantisation_aware_network_takes_plain_trainings_step_at_no_perturbation(take):
    model, plain = quantised(), quantised()
    x, y = images(16, torch.float32)
    for module in (*model.modules(), *plain.modules()):
        if hasattr(module, "disable_observer"):
            module.disable_observer()  # which both passes would move
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    out = take(model, (x, y), epsilon=0.0)
    # Weights are rescaled by running statistics, which the second pass sees one batch later: the loss is of the first.
    torch.testing.assert_close(out.loss, loss.detach())
    statistics = {name: b for name, b in out.buffers.items() if "running" in name or "tracked" in name}
    assert len(statistics) == 3
    torch.testing.assert_close(statistics, {name: dict(plain.named_buffers())[name] for name in statistics})
    assert list(out.stats) == ["0.bn"]
    first = out.grads["3.weight"]
    second = functional_step(model, (x, y), epsilon=0.5).grads["3.weight"]
    assert not torch.allclose(first, second)  # it is perturbed


class Observer(nn.Module):
    """Knows the number of channels once it has seen some, as torch.ao's observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.detach().abs().amax((0, 2, 3)))
        return x


def test_a_buffer_that_takes_its_shape_in_a_first_forward_is_refused_until_there_was_one() -> None:
    model = nn.Sequential(Observer(), convolutional())
    with pytest.raises(StateError, match=r"'0.largest' has shape \(2,\), and the model expects \(1,\).*run one first"):
        functional_step(model, BATCH)
    model(BATCH[0])
    assert functional_step(model, BATCH).buffers["0.largest"].shape == (2,)


# Complex parameters.


class Fourier(nn.Module):
    """A filter bank of complex numbers, whose magnitudes are normalised."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = nn.Parameter(torch.randn(6, 4, dtype=torch.complex128))
        self.norm, self.head = nn.BatchNorm1d(6).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm((x.to(self.filters.dtype) @ self.filters.T).abs()))


def spectra() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator, dtype=torch.float64), torch.arange(16) % 3


class RealFourier(Fourier):
    """The same with real and imaginary part as two parameters, which the definition can differentiate by."""

    def __init__(self) -> None:
        super().__init__()
        filters = self.filters.detach()
        del self.filters
        self.real, self.imaginary = nn.Parameter(filters.real.clone()), nn.Parameter(filters.imag.clone())

    def forward(self, x: Tensor) -> Tensor:
        pair = (x @ self.real.T).square() + (x @ self.imaginary.T).square()
        return self.head(self.norm(pair.sqrt()))


def as_real(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: grad for name, grad in grads.items() if name != "filters"}
    return found | {"real": grads["filters"].real, "imaginary": grads["filters"].imag}


def of_drop_in(model: nn.Module) -> dict[str, Tensor]:
    return drop_in_step(model, spectra(), epsilon=0.2, groups=2).grads


def of_step(kind: str, **options: Any) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda model: STEPS[kind](model, **options)(*split_state(model), spectra(), *more_of(kind, model)).grads


@pytest.mark.parametrize(
    "take", [*map(of_step, STEPS), of_step("APART-SAM", microbatches=2), of_drop_in], ids=[*STEPS, "parts", "drop-in"]
)
def test_complex_parameters_have_the_gradients_of_their_two_parts(take: Any) -> None:
    assert relative_error(as_real(take(Fourier())), take(RealFourier())) < 1e-9


def test_the_climb_of_complex_parameters_is_that_of_the_definition() -> None:
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "rho": 0.3}
    out = make_apart_sam_step(Fourier(), F.cross_entropy, **options)(*split_state(Fourier()), spectra())
    given = {"ratio": 1.0, "perturbation": out.perturbation, **options}
    definition = oracle_step(RealFourier(), F.cross_entropy, spectra(), **given)
    assert relative_error(as_real(out.grads), definition.grads) < 1e-9
    assert out.all_finite


def test_a_complex_gradient_that_is_not_finite_is_seen() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + (output[0, 0] * 0).abs().sqrt()  # of infinite slope

    model = Fourier()
    assert not make_apart_step(model, loss_fn)(*split_state(model), spectra()).all_finite


# Checkpoints.


def checkpointed(start: int, stop: int) -> nn.Module:
    """`smooth`, of which some layers are a segment that runs again in the backward."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.after(checkpoint(model.segment, model.before(x), use_reentrant=False))

    layers = list(smooth())
    parts = {"before": layers[:start], "segment": layers[start:stop], "after": layers[stop:]}
    return Parts(forward, **{name: nn.Sequential(*part) for name, part in parts.items()})


# Recomputation stops early: in the middle of a batch norm that comes last.
SEGMENTS = {"ends with batch norm": (0, 2), "is a batch norm": (1, 2), "has batch norm inside": (0, 3)}


def one_pass_drop_in(model: nn.Module, batch: Any) -> Any:
    apart = APART(model, 0.3, 2)
    in_one_pass(apart, batch)
    return gradients(model), dict(model.named_buffers()), apart.stats, apart.perturbation


CHECKPOINTED: dict[str, Callable[[nn.Module, Any], Any]] = {
    **{
        kind: lambda model, batch, kind=kind: STEPS[kind](model)(*split_state(model), batch, *more_of(kind, model))
        for kind in STEPS
    },
    "drop-in": lambda model, batch: drop_in_step(model, batch, groups=2, epsilon=0.3),
    "one-pass drop-in": one_pass_drop_in,
}


@pytest.mark.parametrize("form", CHECKPOINTED)
@pytest.mark.parametrize("place", SEGMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_that_a_checkpoint_runs_again_is_one_call_in_all_that_a_step_leaves(form, place, dtype):
    """Statistics are (C,), as of one call, their gradients are not added up twice, and the batch counts once."""
    outs = []
    for model in (checkpointed(*SEGMENTS[place]).to(dtype), smooth(dtype=dtype)):
        torch.manual_seed(0)
        outs.append(tree_leaves(tuple(CHECKPOINTED[form](model, images(16, dtype)))))
    assert [part.shape for part in outs[0]] == [part.shape for part in outs[1]]
    torch.testing.assert_close(*outs)


# Models of which little is trained.


def test_a_model_of_which_all_is_frozen_is_refused() -> None:
    model = convolutional().requires_grad_(False)
    for kind in STEPS:
        with pytest.raises(StateError, match=r"nothing to train. Unfreeze"):
            STEPS[kind](model)(*split_state(model), BATCH, *more_of(kind, model))


@both_forms
def test_a_model_of_which_all_but_one_parameter_is_frozen_trains(take: Callable[..., StepOutput]) -> None:
    model = convolutional().requires_grad_(False)
    model[8].bias.requires_grad_()
    assert_agree(take_step(model, BATCH, take, groups=2))


# Autocast keeps what it has cast: APART-SAM moves weights between its passes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_one_autocast_region_the_second_pass_computes_with_the_weights_of_the_climb(dtype: torch.dtype) -> None:
    """A loop of APART-SAM around the drop-in with one region around both, against one with a region for each."""
    x, y = images(16, torch.float32)
    found = []
    for around_both in (True, False):
        model = convolutional(dtype=torch.float32)
        apart = APART(model, 0.2, 2)
        r, rest = weights(16, 16)
        with torch.autocast("cpu", dtype=dtype) if around_both else nullcontext():
            with apart.to_proxy():
                with torch.autocast("cpu", dtype=dtype):
                    loss = r * F.cross_entropy(model(x), y)
                loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.5 * parameter.grad / parameter.grad.norm().clamp(min=1e-3)
            with apart.to_adver():
                with torch.autocast("cpu", dtype=dtype):
                    second = F.cross_entropy(model(x), y)
                (rest * second).backward()
        found.append([second.detach(), gradients(model)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("around_both", [True, False])
def test_a_functional_step_of_apart_sam_under_autocast_computes_with_the_weights_of_the_climb(around_both):
    model = convolutional(dtype=torch.float32)
    batch = images(16, torch.float32)
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "rho": 2.0}
    inner = None if around_both else torch.bfloat16
    step = make_apart_sam_step(model, F.cross_entropy, autocast_dtype=inner, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16) if around_both else nullcontext():
        out = step(*split_state(model), batch)
    exact = oracle_step(model, F.cross_entropy, batch, ratio=1.0, perturbation=out.perturbation, **options)
    still = oracle_step(model, F.cross_entropy, batch, epsilon=0.2, groups=2, ratio=1.0, perturbation=out.perturbation)
    near, far = (relative_error(out.grads, each.grads) for each in (exact, still))
    assert near < 0.1 < far  # activations of 8 bits, against a step of length 2


# State that comes from elsewhere.


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "module.": nn.DataParallel,
    "_orig_mod.": torch.compile,
    "module._orig_mod.": lambda model: nn.DataParallel(torch.compile(model)),
}


def moved_by_one() -> nn.Module:
    model = convolutional()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 1
    return model


@pytest.mark.parametrize("source", WRAPPERS)
@pytest.mark.parametrize("target", WRAPPERS)
def test_state_is_loaded_whatever_wrappers_are_around_either_model(source: str, target: str) -> None:
    inner, other = convolutional(), moved_by_one()
    parameters = list(inner.parameters())
    load_state_(WRAPPERS[target](inner), *split_state(WRAPPERS[source](other)))
    torch.testing.assert_close(dict(inner.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    assert all(now is before for now, before in zip(inner.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    ("params", "buffers"),
    [
        (lambda p: {**p, "8.bias": torch.zeros(9)}, lambda b: b),
        (lambda p: {**p, "8.bias": None}, lambda b: b),
        (lambda p: p, lambda b: {**b, "4.running_var": [1.0] * 5}),
        (lambda p: {name: v for name, v in p.items() if name != "8.bias"}, lambda b: b),
        (lambda p: p, lambda b: {**b, "9.more": torch.zeros(1)}),
        (lambda p: {**p, "1.running_mean": torch.zeros(4)}, lambda b: b),
        (lambda p: list(p.values()), lambda b: b),
        (lambda p: p, lambda b: None),
        (lambda p: {**p, "8.bias": p["8.bias"].to("meta")}, lambda b: b),
        (lambda p: {name: tensor + 1j for name, tensor in p.items()}, lambda b: b),
        (lambda p: {**p, "8.bias": p["8.bias"].to_sparse()}, lambda b: b),
        (lambda p: {**p, "8.bias": torch.quantize_per_tensor(p["8.bias"].float(), 0.1, 0, torch.qint8)}, lambda b: b),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantiz")  # PyTorch's own, of its old quantised tensors
def test_a_state_that_does_not_fit_is_refused_and_changes_no_tensor(params, buffers):
    model = convolutional()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good_params, good_buffers = split_state(moved_by_one())
    with pytest.raises(StateError):
        load_state_(model, params(good_params), buffers(good_buffers))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("last", [lambda grad: grad.to("meta"), lambda grad: grad + 1j, lambda grad: grad[:1]])
def test_gradients_of_which_the_last_does_not_fit_change_no_parameter(last: Callable[[Tensor], Tensor]) -> None:
    model = convolutional()
    grads = functional_step(model, BATCH).grads
    with pytest.raises(StateError, match=r"'8.bias'"):
        assign_grads_(model, {**grads, "8.bias": last(grads["8.bias"])})
    assert all(parameter.grad is None for parameter in model.parameters())
