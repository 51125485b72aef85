"""The law of the radius, seen from outside: what batch norm normalised by, found from its input and its output.

In every channel of every ghost group, a layer's output is an affine map of its input, y = γ (x − μ')/s' + β. Least
squares in float64 find the map, and with γ and β known μ' and s'; μ and s are those of the input itself. The law is

    |μ'/μ − 1| ≤ ε  and  |s/s' − 1| ≤ ε        with equality where a rule of signs made the perturbation

The networks tell what their layers saw by gradients: their loss multiplies it with parameters that are zero, the
probes, so the gradient of a probe is what was seen. That works in a step that is eager, mapped or compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from apart_func import (
    APART,
    BatchStats,
    Perturbation,
    init_perturbation,
    l2_perturbation,
    make_apart_step,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)
from apart_func.robustness import robustness

CLASSES, CHANNELS, SAMPLES, POINTS = 3, 4, 8, 3
NODES = torch.tensor([2, 5, 1, 3, 4, 2, 2, 6])  # of each sample, where samples have unlike numbers of them
NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# Positions of a sample in every layout. Large ones have enough activations for the kernels of large layers.
LAYOUTS: dict[str, tuple[int, ...]] = {
    "vectors": (),
    "sequences": (5,),
    "images": (2, 3),
    "channels_last": (2, 3),
    "volumes": (2, 1, 3),
    "large images": (64, 32),
    "large channels_last": (64, 32),
    "points: consecutive": (),
    "points: interleaved": (),
    "points: function": (),
    "nodes: function": (),
}

# How far y may be from what it should be, as a share of the largest one. Half precision rounds y by a share of 2⁻¹² or
# 2⁻⁹, and an affine map of x by slope and intercept as well; in the other dtypes some hundred sums round.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """A network, its batch, and the settings of a step."""

    layout: str
    dtype: torch.dtype = torch.float64
    groups: int = 2
    ratio: float = 1.0
    epsilon: float = 0.1
    calls: int = 1
    affine: str = "trained"
    seed: int = 0

    @property
    def rows(self) -> Any:
        kind, _, rows = self.layout.partition(": ")
        return {"": None, "function": sample_of_nodes if kind == "nodes" else sample_of_points}.get(rows, rows)

    def sample_of_rows(self, rows: int, samples: int) -> Tensor:
        if self.layout.startswith("nodes"):
            return sample_of_nodes("", torch.empty(rows))
        if self.layout == "points: interleaved":
            return torch.arange(rows) % samples
        return torch.arange(rows) // (rows // samples)


def sample_of_points(layer: str, x: Tensor) -> Tensor:
    return torch.arange(len(x)) // POINTS


def sample_of_nodes(layer: str, x: Tensor) -> Tensor:
    return torch.arange(SAMPLES).repeat_interleave(NODES)[: len(x)]


class Network(nn.Module):
    """h ← h + tanh(norm(h)) / 2, for each of two norms; the second is called as often as the case says.

    It returns class scores, and for every sample the sum of what its layers saw, times the probes; this sum from some
    forward on, which it counts in a buffer, so that one pass of several can be told apart.
    """

    def __init__(self, case: Case, tells_from: int = 0) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        norm = NORMS[2 + len(LAYOUTS[case.layout])]
        self.case, self.calls = case, (0, *[1] * case.calls)
        self.norms = nn.ModuleList(norm(CHANNELS, affine=case.affine != "none") for _ in range(2))
        self.head = nn.Linear(CHANNELS, CLASSES)
        for parameter in self.norms.parameters():
            with torch.no_grad():  # γ far from zero, and both signs
                parameter.copy_((torch.rand(CHANNELS) + 0.5) * torch.tensor([1, -1, 1, 1]))
            parameter.requires_grad_(case.affine == "trained")
        self.to(case.dtype)
        self.tells_from = tells_from
        self.register_buffer("forwards", torch.tensor(0))
        wide = torch.promote_types(case.dtype, torch.float32)
        shape = self.rows_of(batch_of(case)[0]).shape
        self.probes = nn.ParameterList(torch.zeros(shape, dtype=wide) for _ in range(2 * len(self.calls)))

    def rows_of(self, x: Tensor) -> Tensor:
        if self.case.layout.startswith("nodes"):
            return x[torch.arange(x.shape[1]) < NODES[: len(x), None]]
        if self.case.layout.startswith("points"):
            return (x.transpose(0, 1) if self.case.layout.endswith("interleaved") else x).flatten(0, 1)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rows_of(x)
        sample = self.case.sample_of_rows(len(h), len(x))
        told = self.probes[0].new_zeros(len(x))
        for call, norm in enumerate(self.calls):
            y = self.norms[norm](h)
            for i, seen in enumerate((h, y)):
                products = self.probes[2 * call + i][: len(h)] * seen.detach()
                told = told.index_add(0, sample, products.flatten(1).sum(1))
            h = h + torch.tanh(y) / 2
        told = told * (self.forwards >= self.tells_from)
        self.forwards += 1
        means = h.flatten(2).mean(2) if h.dim() > 2 else h
        return self.head(means.new_zeros(len(x), CHANNELS).index_add(0, sample, means)), told


def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The probes are zero, and what was seen is a constant, so only their own gradients know of them."""
    return F.cross_entropy(output[0], target) + output[1].mean()


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Activations whose mean is far from zero in every channel, since shifts are relative to it."""
    generator = torch.Generator().manual_seed(case.seed)
    points = {"points": (POINTS,), "nodes": (int(NODES.max()),)}.get(case.layout.split(":")[0], ())
    x = 0.7 * torch.randn(SAMPLES, *points, *LAYOUTS[case.layout], CHANNELS, generator=generator, dtype=torch.float64)
    x = (x + torch.tensor([2.0, -1.5, 1.0, -3.0])).to(case.dtype)
    if not points:
        x = x.movedim(-1, 1)
        if not case.layout.endswith("channels_last"):
            x = x.contiguous()
    return x, torch.arange(SAMPLES) % CLASSES


# What a layer normalised by.


class Call(NamedTuple):
    norm: int
    x: Tensor
    y: Tensor


def calls_of(model: Network, grads: dict[str, Tensor], samples: int, rows: int | None = None) -> list[Call]:
    seen = [grads[f"probes.{i}"].double()[:rows] * samples for i in range(len(model.probes))]
    return [Call(norm, *seen[2 * i : 2 * i + 2]) for i, norm in enumerate(model.calls)]


class Normalised(NamedTuple):
    """The statistics of a ghost group, and those that it was normalised by, `(C,)` each."""

    mean: Tensor
    std: Tensor
    pushed_mean: Tensor
    pushed_std: Tensor
    noise: Tensor  # of what recovers them, in roundings of y


def normalised_by(norm: Any, x: Tensor, y: Tensor) -> Normalised:
    """Recover μ' and s' from the input and output of a layer, on the samples of one ghost group."""
    gamma, beta = (1.0, 0.0) if norm.weight is None else (part.detach().double() for part in (norm.weight, norm.bias))
    x, y = (part.movedim(1, -1).flatten(0, -2) for part in (x, y))
    mean, var = x.mean(0), x.var(0, unbiased=False)
    std = (var + norm.eps).sqrt()
    slope = ((x - mean) * (y - y.mean(0))).mean(0) / var  # least squares of y = slope · x + intercept
    noise = (y / gamma).abs().amax(0) * std / var.sqrt()
    return Normalised(mean, std, mean - (y.mean(0) - beta) / slope, gamma / slope, noise)


def groups_of(case: Case, samples: int) -> int:
    return {0: 1, -1: samples}.get(case.groups, case.groups)


def assert_normalised_by(
    case: Case, model: Network, calls: list[Call], samples: int, perturbation: dict[str, Perturbation], clean: int = 0
) -> None:
    """The first groups saw statistics as they are, and all others those that are shifted by the perturbation."""
    groups = groups_of(case, samples)
    for call in calls:
        shift = perturbation[f"norms.{call.norm}"]
        group = case.sample_of_rows(len(call.x), samples) % groups
        for g in range(groups):
            found = normalised_by(model.norms[call.norm], call.x[group == g], call.y[group == g])
            by_mean, by_scale = (0, 0) if g < clean else (part.detach().double() for part in shift)
            mean, std = found.mean * (1 + by_mean), found.std / (1 + by_scale)
            slack = TOLERANCE[case.dtype] * found.noise / (1 + by_scale)
            off_mean, off_std = (found.pushed_mean - mean).abs(), (found.std / found.pushed_std - found.std / std).abs()
            told = slack < 0.2  # else two values of half precision are almost the same, and say nothing
            assert (off_mean <= slack * (found.mean.abs() + std))[told].all()
            assert (off_std <= slack)[told].all()


def assert_statistics(
    case: Case, calls: list[Call], samples: int, stats: dict[str, BatchStats], clean: int = 0
) -> None:
    groups, rounding = groups_of(case, samples), 1e-9 if case.dtype == torch.float64 else 1e-4
    for norm in (0, 1):
        own = [call for call in calls if call.norm == norm]
        shape = len(own), groups - clean, CHANNELS
        returned = (part.double().reshape(shape) for part in stats[f"norms.{norm}"])
        for call, mean, var in zip(own, *returned, strict=True):
            group = case.sample_of_rows(len(call.x), samples) % groups
            for g in range(clean, groups):
                x = call.x[group == g].movedim(1, -1).flatten(0, -2)
                torch.testing.assert_close(mean[g - clean], x.mean(0), rtol=rounding, atol=rounding)
                torch.testing.assert_close(var[g - clean], x.var(0, unbiased=False), rtol=rounding, atol=rounding)


def assert_on_the_radius(case: Case, perturbation: Any, stat_grads: Any = None) -> None:
    """A rule of signs uses all of the radius, but where the gradient has no sign."""
    for layer, shift in perturbation.items():
        for i, delta in enumerate(shift):
            expected = torch.full_like(delta, case.epsilon)
            if stat_grads is not None:
                expected = expected * (stat_grads[layer][i] != 0)
            torch.testing.assert_close(delta.abs(), expected)


# The forms of a step. What each returns says which perturbation it used, and its layers are held to that.


def two_passes(case: Case, call: Callable[..., Any] = lambda step, *state: step(*state), **options: Any) -> Any:
    model, batch = Network(case, tells_from=1), batch_of(case)
    options = {"groups": case.groups, "ratio": case.ratio, "rows": case.rows, **options}
    out = call(make_apart_step(model, loss, epsilon=case.epsilon, **options), *split_state(model), batch)
    check_two_passes(case, model, out)
    return out


def check_two_passes(case: Case, model: Network, out: Any) -> None:
    """The second pass, which alone tells, is a mean over N with a weight of N / (M + N)."""
    samples = int(case.ratio * SAMPLES)
    calls = calls_of(model, out.grads, SAMPLES + samples, len(model.rows_of(batch_of(case)[0][:samples])))
    assert_normalised_by(case, model, calls, samples, out.perturbation)
    assert_statistics(case, calls, samples, out.adversarial_stats)


def one_pass(
    case: Case, call: Callable[..., Any] = lambda step, *state: step(*state), given: Any = None, **options: Any
) -> Any:
    """Take the functional step of one pass, at a perturbation that is given, or drawn."""
    model, batch = Network(case), batch_of(case)
    step = make_one_pass_step(model, loss, epsilon=case.epsilon, groups=case.groups, rows=case.rows, **options)
    out = call(step, *split_state(model), batch, *([] if given is None else [given]))
    check_one_pass(case, model, out, given or out.perturbation)
    return out


def check_one_pass(case: Case, model: Network, out: Any, perturbation: Any) -> None:
    """Half of the groups are clean."""
    calls, clean = calls_of(model, out.grads, SAMPLES), groups_of(case, SAMPLES) // 2
    assert_normalised_by(case, model, calls, SAMPLES, perturbation, clean)
    assert_statistics(case, calls, SAMPLES, out.adversarial_stats, clean)


def drop_in(case: Case, compiled: bool = False) -> APART:
    model, batch = Network(case), batch_of(case)
    method = APART(model, case.epsilon / 2, case.groups, rows=case.rows)
    forward = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model
    with method.to_proxy():
        calls = calls_of(model, backward(model, forward, batch), SAMPLES)
    method.set_epsilon(case.epsilon)
    assert_normalised_by(replace(case, groups=1), model, calls, SAMPLES, init_perturbation(model))
    samples = int(case.ratio * SAMPLES)
    part = batch[0][:samples], batch[1][:samples]
    with method.to_adver():
        calls = calls_of(model, backward(model, forward, part), samples, len(model.rows_of(part[0])))
    assert_normalised_by(case, model, calls, samples, method.perturbation)
    return method


def one_pass_drop_in(case: Case, compiled: bool = False) -> APART:
    model, batch = Network(case), batch_of(case)
    method = APART(model, case.epsilon, case.groups, rows=case.rows)
    forward = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model
    with method.one_pass():
        calls = calls_of(model, backward(model, forward, batch), SAMPLES)
    assert_normalised_by(case, model, calls, SAMPLES, method.perturbation, clean=groups_of(case, SAMPLES) // 2)
    return method


def backward(model: Network, forward: Any, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss(forward(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# The law, in every form.


@st.composite
def cases(draw: Any, layout: str, *, one_pass: bool = False, trained: bool = True) -> Case:
    """Everything else about a case. Groups are as many as leave two values in each."""
    ratio = draw(st.sampled_from([1.0] if one_pass else [1.0, 0.5]))
    groups = [2, *([] if one_pass else [0]), *([4] if ratio == 1 else [])]
    if LAYOUTS[layout] or layout.startswith("points"):
        groups.append(-1)
    return Case(
        layout,
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        groups=draw(st.sampled_from(groups)),
        ratio=ratio,
        epsilon=draw(st.floats(0.05, 0.9)),
        calls=draw(st.integers(1, 2)),
        affine=draw(st.sampled_from(["frozen", "none", *(["trained"] if trained else [])])),
        seed=draw(st.integers(0, 2**20)),
    )


every_layout = pytest.mark.parametrize("layout", LAYOUTS)
few = settings(max_examples=5)  # of every layout


@every_layout
@few
@given(data=st.data())
def test_two_passes(layout: str, data: st.DataObject) -> None:
    case = data.draw(cases(layout))
    out = two_passes(case)
    assert_on_the_radius(case, out.perturbation, out.stat_grads)


@every_layout
@few
@given(data=st.data())
def test_apart_sam(layout: str, data: st.DataObject) -> None:
    """Scale and bias are not trained here: they would be others in the second pass."""
    case = data.draw(cases(layout, trained=False))
    out = two_passes(case, rho=0.1)
    assert_on_the_radius(case, out.perturbation, out.stat_grads)


@every_layout
@few
@given(data=st.data())
def test_one_pass(layout: str, data: st.DataObject) -> None:
    case = data.draw(cases(layout, one_pass=True))
    assert_on_the_radius(case, one_pass(case).perturbation)


@every_layout
@few
@given(data=st.data())
def test_one_pass_at_a_perturbation_of_the_step_before(layout: str, data: st.DataObject) -> None:
    case = data.draw(cases(layout, one_pass=True))
    first = one_pass(case, given=init_perturbation(Network(case)), rule=sign_perturbation)
    assert_on_the_radius(case, first.perturbation, first.stat_grads)
    one_pass(case, given=first.perturbation, rule=sign_perturbation)


@every_layout
@few
@given(data=st.data())
def test_the_drop_in(layout: str, data: st.DataObject) -> None:
    case = data.draw(cases(layout))
    method = drop_in(case)
    assert_on_the_radius(case, method.perturbation, method.stat_grads)


@every_layout
@few
@given(data=st.data())
def test_the_drop_in_of_one_pass(layout: str, data: st.DataObject) -> None:
    case = data.draw(cases(layout, one_pass=True).filter(lambda case: case.groups > 0))
    assert_on_the_radius(case, one_pass_drop_in(case).perturbation)


@few
@given(case=cases("images"), radius=st.floats(0.05, 0.9))
def test_a_radius_for_one_call(case: Case, radius: float) -> None:
    out = two_passes(case, lambda step, *state: step(*state, epsilon=radius))
    assert_on_the_radius(replace(case, epsilon=radius), out.perturbation, out.stat_grads)
    case = replace(case, groups=2)
    drawn = one_pass(case, lambda step, *state: step(*state, epsilon=torch.tensor(radius)))
    assert_on_the_radius(replace(case, epsilon=radius), drawn.perturbation)


@few
@given(case=cases("images"))
def test_an_l2_step_has_the_radius_for_its_length(case: Case) -> None:
    for shift in two_passes(case, rule=l2_perturbation).perturbation.values():
        assert float(torch.cat(shift).norm()) == pytest.approx(case.epsilon)


@pytest.mark.parametrize("passes", [2, 1])
@every_layout
def test_two_models_mapped_together_at_radii_of_their_own(layout: str, passes: int) -> None:
    case, batch, radii = Case(layout, calls=2), batch_of(Case(layout)), torch.tensor([0.1, 0.4]).double()
    models = [Network(replace(case, seed=seed), tells_from=passes - 1) for seed in (1, 2)]
    make: Any = make_apart_step if passes == 2 else make_one_pass_step
    step = make(models[0], loss, epsilon=0.2, groups=2, rows=case.rows)
    leaves, spec = zip(*(tree_flatten(split_state(model)) for model in models), strict=True)
    params, buffers = tree_unflatten([torch.stack(pair) for pair in zip(*leaves, strict=True)], spec[0])
    out = vmap(lambda p, b, e: step(p, b, batch, epsilon=e), randomness="different")(params, buffers, radii)
    for i, model in enumerate(models):
        own, one = replace(case, epsilon=float(radii[i])), tree_map(lambda leaf, i=i: leaf[i], out)
        assert_on_the_radius(own, one.perturbation)
        if passes == 2:
            check_two_passes(own, model, one)
        else:
            check_one_pass(own, model, one, one.perturbation)


def compiled_call(step: Any, *state: Any) -> Any:
    return torch.compile(step, backend="aot_eager", fullgraph=True)(*state)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("form", "layout"), [(two_passes, "points: consecutive"), (one_pass, "channels_last")])
def test_a_compiled_step(form: Callable[..., Any], layout: str) -> None:
    case = Case(layout, calls=2)
    assert_on_the_radius(case, form(case, compiled_call).perturbation)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("form", [drop_in, one_pass_drop_in])
def test_a_compiled_model_in_the_drop_in(form: Callable[..., APART]) -> None:
    case = Case("images", calls=2)
    assert_on_the_radius(case, form(case, compiled=True).perturbation)


# In evaluation, where it is the running statistics that are pushed.


class Watched(nn.Module):
    """Two norms in evaluation; every forward notes what they saw, and of how many samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.BatchNorm1d(CLASSES).double() for _ in range(2))
        for norm in self.norms:
            norm.running_mean.normal_().add_(2)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for norm in self.norms:
            seen.append((x.detach(), norm(x).detach()))
            x = x + torch.tanh(norm(x))
        SEEN.append(seen)
        return x


SEEN: list[list[tuple[Tensor, Tensor]]] = []


def test_robustness_pushes_running_statistics_to_each_radius_and_no_further() -> None:
    """Once as they are; then every direction at every radius: of all layers, and of each alone."""
    radii, draws, layer_draws = (0.1, 0.25, 0.6), 2, 3
    model, x = Watched().eval(), torch.randn(16, CLASSES).double() * 2
    batches = [(x, torch.arange(16) % CLASSES)]
    SEEN.clear()
    robustness(
        model, F.cross_entropy, [(x[:5], batches[0][1][:5])], batches, radii, draws=draws, layer_draws=layer_draws
    )
    pushed = []
    for seen in (seen for seen in SEEN if len(seen[0][0]) == 16):
        of_layers = []
        for norm, (x, y) in zip(model.norms, seen, strict=True):
            found = normalised_by(norm, x, y)
            of_layers.append(found.pushed_mean / norm.running_mean - 1)
            of_layers.append((norm.running_var + norm.eps).sqrt() / found.pushed_std - 1)
        pushed.append(tuple(round(float(value), 6) for value in torch.stack(of_layers).abs().flatten()))
    at, zero = {e: (e,) * 2 * CLASSES for e in radii}, (0.0,) * 2 * CLASSES
    together = [at[e] + at[e] for e in radii]
    alone = [pair for e in radii for pair in (at[e] + zero, zero + at[e])]
    assert sorted(pushed) == sorted([zero + zero, *(1 + draws) * together, *(1 + layer_draws) * alone])
