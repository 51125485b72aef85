"""Models that do with batch norm what some do: read its statistics, have no counter, quantise, checkpoint, freeze."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import both_passes, drop_in_step, gradients, weights
from oracle import oracle_sam_step, oracle_step
from small import convolutional, images
from test_against_oracle import Comparison, assert_agree, relative_error, take_step
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from apart_func import (
    APART,
    StateError,
    StepOutput,
    assign_grads_,
    init_perturbation,
    load_state_,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    split_state,
)

BATCH = images()
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}


def functional_step(model: nn.Module, batch: Any, **options: Any) -> StepOutput:
    return make_apart_step(model, F.cross_entropy, **options)(*split_state(model), batch)


both_forms = pytest.mark.parametrize("take", [functional_step, drop_in_step])


# Layers without a counter.


@both_forms
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_without_a_counter_is_one_with_it_but_for_the_counter(
    take: Callable[..., StepOutput], momentum: float | None
) -> None:
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


class Reader(nn.Module):
    """Divides by what the running statistics of its layer are at the time, as renormalisation and some losses do."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.body = convolutional(momentum)
        self.seen: list[Tensor] = []
        self.body[4].register_forward_hook(self.look)

    def look(self, layer: Any, inputs: Any, output: Tensor) -> Tensor:
        state = torch.cat([layer.running_mean, layer.running_var, layer.num_batches_tracked[None]])
        self.seen.append(state.detach().clone())
        return output / (1 + layer.running_var.clone().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        before = self.body[1].running_mean.clone()
        y = self.body(x)
        return y * (1 + (self.body[1].running_mean - before).abs().mean())


@both_forms
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_a_forward_that_reads_running_statistics_reads_what_plain_training_would_show_it(
    take: Callable[..., StepOutput], momentum: float | None
) -> None:
    model, plain, untouched = (Reader(momentum).double() for _ in range(3))
    output = plain(BATCH[0])
    out = take(model, BATCH, epsilon=0.2, groups=2)
    torch.testing.assert_close(out.loss, F.cross_entropy(output, BATCH[1]).detach(), **ROUNDING)
    torch.testing.assert_close(out.buffers, dict(plain.named_buffers()), **ROUNDING)
    if take is drop_in_step:
        # the adversarial pass sees what the proxy pass has left, and moves nothing
        torch.testing.assert_close(model.seen, [plain.seen[0]] * 2, **ROUNDING)
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "ratio": 1.0}
    definition = oracle_step(untouched, F.cross_entropy, BATCH, perturbation=out.perturbation, **options)
    assert_agree(Comparison(out, definition, 0.2, 1e-9))


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


@both_forms
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_running_statistics_sees_those_of_the_calls_so_far(
    take: Callable[..., StepOutput], look: str
) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutional()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y * LOOKS[look](self.body).detach().clone().mean()

    model, untouched, plain = Looks(), Looks(), Looks()
    output = plain(BATCH[0])
    out = take(model, BATCH, epsilon=0.2, groups=2)
    torch.testing.assert_close(out.output, output.detach(), **ROUNDING)
    torch.testing.assert_close(out.buffers, dict(plain.named_buffers()), **ROUNDING)
    if look == "in evaluation mode":
        return  # the definition normalises whatever the mode is
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "ratio": 1.0}
    definition = oracle_step(untouched, F.cross_entropy, BATCH, perturbation=out.perturbation, **options)
    assert_agree(Comparison(out, definition, 0.2, 1e-9))


@both_forms
def test_a_layer_that_is_called_twice_shows_its_second_call_what_the_first_has_left(
    take: Callable[..., StepOutput],
) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = self.norm(x)
            means = self.norm.running_mean.clone()
            second = self.norm(2 * x + 1)
            return self.head(first * second + means - self.norm.running_mean)

    torch.manual_seed(0)
    model = Twice().double()
    plain = copy.deepcopy(model)
    batch = torch.randn(8, 3).double(), torch.arange(8) % 3
    expected = F.cross_entropy(plain(batch[0]), batch[1])
    out = take(model, batch)
    torch.testing.assert_close(out.loss, expected.detach(), **ROUNDING)
    torch.testing.assert_close(out.buffers, dict(plain.named_buffers()), **ROUNDING)


def test_in_one_pass_a_forward_reads_the_running_statistics_of_the_clean_samples() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.norm(x)), self.norm.running_mean.expand(len(x), -1).clone()

    torch.manual_seed(0)
    model = Reads().double()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 3
    step = make_one_pass_step(model, lambda o, t: F.cross_entropy(o[0], t), epsilon=0.1, groups=2)
    out = step(*split_state(model), (x, y), init_perturbation(model))
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
def test_a_quantisation_aware_network_takes_plain_trainings_step_at_no_perturbation(
    take: Callable[..., StepOutput],
) -> None:
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
    return torch.randn(12, 4, generator=generator, dtype=torch.float64), torch.arange(12) % 3


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
    """Gradients of `Fourier`, by the names of `RealFourier`."""
    found = {name: grad for name, grad in grads.items() if name != "filters"}
    return found | {"real": grads["filters"].real, "imaginary": grads["filters"].imag}


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_complex_parameters_have_the_gradients_of_their_two_parts(rho: float, microbatches: int) -> None:
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "rho": rho, "microbatches": microbatches}
    out, expected = (
        make_apart_sam_step(model, F.cross_entropy, **options)(*split_state(model), spectra())
        for model in (Fourier(), RealFourier())
    )
    assert relative_error(as_real(out.grads), expected.grads) < 1e-9
    assert out.all_finite
    if microbatches == 1 and rho:
        options = {"epsilon": 0.2, "groups": 2, "rho": rho, "ratio": 1.0}
        definition = oracle_sam_step(
            RealFourier(), F.cross_entropy, spectra(), perturbation=out.perturbation, **options
        )
        assert relative_error(as_real(out.grads), definition.grads) < 1e-9


def test_complex_parameters_train_in_one_pass_and_in_the_drop_in() -> None:
    found = []
    for model in (Fourier(), RealFourier()):
        step = make_one_pass_step(model, F.cross_entropy, epsilon=0.2, groups=2)
        found.append(step(*split_state(model), spectra(), init_perturbation(model)).grads)
        both_passes(APART(model, 0.2, 2), spectra())
        found.append(gradients(model))
    for complex_one, real_one in zip(found[:2], found[2:], strict=True):
        assert relative_error(as_real(complex_one), real_one) < 1e-9


def test_a_complex_gradient_that_is_not_finite_is_seen() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + (output[0, 0] * 0).abs().sqrt()  # of infinite slope

    model = Fourier()
    assert not make_apart_step(model, loss_fn)(*split_state(model), spectra()).all_finite


# Checkpoints.


class Segment(nn.Module):
    """A network whose checkpointed segment ends, or starts, with batch norm."""

    def __init__(self, ends: bool, reentrant: bool = False) -> None:
        super().__init__()
        layers = list(convolutional())
        self.first = nn.Sequential(*(layers[:2] if ends else layers[:1]))
        self.rest = nn.Sequential(*(layers[2:] if ends else layers[1:]))
        self.ends, self.reentrant = ends, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.ends:
            return self.rest(self.checkpointed(self.first, x))
        return self.rest[1:](self.checkpointed(self.rest[:1], self.first(x)))

    def checkpointed(self, segment: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(segment, x, use_reentrant=self.reentrant)
        return result


def list_of(tree: dict[str, Any]) -> list[Any]:
    return list(tree.values())


@both_forms
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_checkpointed_segment_may_end_or_be_a_batch_norm(
    take: Callable[..., StepOutput], ends: bool, dtype: torch.dtype
) -> None:
    batch = images(16, dtype)
    found = take(Segment(ends).to(dtype), batch, groups=2, epsilon=0.3)
    expected = take(convolutional(dtype=dtype), batch, groups=2, epsilon=0.3)
    for field in ("grads", "buffers", "stats", "perturbation"):
        torch.testing.assert_close(list_of(getattr(found, field)), list_of(getattr(expected, field)))
    assert {int(n) for name, n in found.buffers.items() if "tracked" in name} == {1}


def test_a_checkpointed_segment_that_ends_in_batch_norm_trains_in_one_pass() -> None:
    models = Segment(ends=True), convolutional()
    for model in models:
        apart = APART(model, 0.3, 2)
        for seed in range(2):
            model.zero_grad()
            torch.manual_seed(seed)
            with apart.one_pass():
                F.cross_entropy(model(images(seed=seed)[0]), images(seed=seed)[1]).backward()
    torch.testing.assert_close(list_of(gradients(models[0])), list_of(gradients(models[1])), **ROUNDING)
    torch.testing.assert_close(list(models[0].buffers()), list(models[1].buffers()), **ROUNDING)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("form", ["two passes", "APART-SAM", "one pass"])
def test_a_layer_that_a_checkpoint_runs_again_is_one_call_in_all_that_a_step_returns(form: str, ends: bool) -> None:
    """Statistics are (C,), as of one call, and their gradients are not added up twice."""
    outs = []
    for model in (Segment(ends), convolutional()):
        if form == "one pass":
            step: Any = make_one_pass_step(model, F.cross_entropy, epsilon=0.3, groups=2)
        else:
            step = make_apart_step(model, F.cross_entropy, epsilon=0.3, groups=2, rho=0.1 * (form == "APART-SAM"))
        torch.manual_seed(0)
        outs.append(step(*split_state(model), images(16)))
    found, expected = (tree_leaves(out._asdict()) for out in outs)
    assert [part.shape for part in found] == [part.shape for part in expected]
    torch.testing.assert_close(found, expected, **ROUNDING)


# Models of which little is trained.


def test_a_model_of_which_all_is_frozen_is_refused() -> None:
    model = convolutional().requires_grad_(False)
    with pytest.raises(StateError, match=r"nothing to train. Unfreeze"):
        make_apart_step(model, F.cross_entropy)(*split_state(model), BATCH)
    with pytest.raises(StateError, match=r"nothing to train. Unfreeze"):
        make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2)(
            *split_state(model), BATCH, init_perturbation(model)
        )


def test_a_model_of_which_all_but_one_parameter_is_frozen_trains() -> None:
    model = convolutional().requires_grad_(False)
    model[8].bias.requires_grad_()
    assert_agree(take_step(model, BATCH, groups=2))
    untouched = copy.deepcopy(model)
    drop_in = drop_in_step(model, BATCH, groups=2)
    options: dict[str, Any] = {"epsilon": 0.1, "groups": 2, "ratio": 1.0}
    definition = oracle_step(untouched, F.cross_entropy, BATCH, perturbation=drop_in.perturbation, **options)
    assert_agree(Comparison(drop_in, definition, 0.1, 1e-9))


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
def test_a_functional_step_of_apart_sam_under_autocast_computes_with_the_weights_of_the_climb(
    around_both: bool,
) -> None:
    model = convolutional(dtype=torch.float32)
    batch = images(16, torch.float32)
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 2, "rho": 2.0}
    inner = None if around_both else torch.bfloat16
    step = make_apart_sam_step(model, F.cross_entropy, autocast_dtype=inner, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16) if around_both else nullcontext():
        out = step(*split_state(model), batch)
    exact = oracle_sam_step(model, F.cross_entropy, batch, ratio=1.0, perturbation=out.perturbation, **options)
    still = oracle_step(model, F.cross_entropy, batch, epsilon=0.2, groups=2, ratio=1.0, perturbation=out.perturbation)
    near, far = (relative_error(out.grads, each.grads) for each in (exact, still))
    assert near < 0.1 < far  # activations of 8 bits, against a step of length 2


# State that comes from elsewhere.


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class Compiled(nn.Module):
    """What torch.compile does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Any:
        return self._orig_mod(x)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    return {
        "plain": lambda: model,
        "module.": lambda: Wrapper(model),
        "_orig_mod.": lambda: Compiled(model),
        "module._orig_mod.": lambda: Wrapper(Compiled(model)),
    }[kind]()


KINDS = ["plain", "module.", "_orig_mod.", "module._orig_mod."]


def test_compiling_names_the_model_as_it_does_here() -> None:
    assert list(torch.compile(convolutional()).state_dict()) == list(Compiled(convolutional()).state_dict())


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_state_is_loaded_whatever_wrappers_are_around_either_model(source: str, target: str) -> None:
    inner, other = convolutional(), convolutional()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor += 1
    load_state_(wrapped(target, inner), *split_state(wrapped(source, other)))
    torch.testing.assert_close(dict(inner.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


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
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_no_tensor(
    params: Callable[[Any], Any], buffers: Callable[[Any], Any]
) -> None:
    model, other = convolutional(), convolutional()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor += 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good_params, good_buffers = split_state(other)
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
