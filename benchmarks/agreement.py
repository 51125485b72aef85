"""A step of every form of the library, compared with the definition, for one model and batch.

    plain = plain_step(case)                 # the model trains at all; by this the definition itself is checked
    row = against_definition(case, plain)    # errors by form, what was refused, and what rounding decides

Two passes are compared at the δ that the library found, one pass at that δ as well: where a statistic gradient is zero
but for rounding, its sign is a coin toss, and nothing after it could agree.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import definition
import numpy as np
import torch
from catalogue import Case
from common import Row
from definition import Shift, trained
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.utils._python_dispatch import TorchDispatchMode

from apart_func import (
    APART,
    AdversarialOutput,
    ApartError,
    Perturbation,
    PerturbationTree,
    adversarial_pass,
    functionalize,
    make_apart_step,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)

RADIUS = 0.1
GROUPS = 2
CLEAN = 1
KINDS = ("gradients", "statistic gradients", "running statistics")
FORMS = ("two passes", "drop-in", "one pass", "one-pass drop-in")

# A statistic gradient is taken for zero where the terms that it is the sum of cancel to ten digits. Between those that
# cancel to the last digit of float64 and those that do not there is nothing: the largest of the former are 1e-13 of
# their terms, the smallest of the latter 1e-6.
CANCELS = 1e-10
# Below this the sign of a statistic gradient is left out of the comparison of signs.
CLEAR = 1e-6
# Largest ‖difference‖/‖expected‖ of a tensor, where the norm of the definition's is taken as no less than this share
# of the largest one's: the gradient of a bias in front of batch norm is zero.
LEAST_NORM = 1e-4
# Rounding of float64 in another order, as far as networks of two hundred layers enlarge it; and that of float32, to
# which some networks convert their activations whatever they are given.
TOLERANCE = {"float64": 1e-7, "float32": 2e-2}


class Taken(NamedTuple):
    """A step that the library has taken.

    Attributes:
        grads: by parameter.
        stat_grads: ∂L_p/∂δ by layer.
        buffers: after the step.
        perturbation: δ, of this step where it has two passes, of the next where it has one.
    """

    grads: Mapping[str, Tensor]
    stat_grads: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    perturbation: PerturbationTree


class Options(NamedTuple):
    """How a step is taken.

    Attributes:
        groups: ghost groups.
        rows: how rows belong to samples.
        epsilon: the radius.
    """

    groups: int = GROUPS
    rows: Any = None
    epsilon: float = RADIUS


def against_definition(case: Case, plain: Plain) -> Row:
    """Take a step in every form, and compare it with the definition.

    Args:
        case: in the precision to compare in.
        plain: a step of plain training of the same case.

    Returns:
        `outcome` is "compared", "refused", or "DIFFERS"; with the errors of every form.
    """
    options, taken, refused = most_of(case)
    precision = "float64" if plain.is_double else "float32"
    row: Row = {"precision": precision, "groups": options.groups, "rows": options.rows, "refused": refused}
    if "two passes" not in taken:
        return row | {"outcome": "refused"}
    steps = defined_steps(case, options, taken)
    errors = {form: errors_of(taken[form], step) for form, step in steps.items()}
    clean = steps["two passes"]
    errors["plain training"] = {
        "gradients": largest_error(plain.grads, clean.proxy_grads),
        "running statistics": largest_error(plain.buffers, clean.buffers),
    }
    wrong = sum(wrong_signs(taken[form], clean, TOLERANCE[precision]) for form in ("two passes", "drop-in"))
    worst = max(error for of_form in errors.values() for error in of_form.values())
    outcome = "compared" if worst <= TOLERANCE[precision] and not wrong else "DIFFERS"
    return (
        row
        | {"outcome": outcome, "errors": errors, "wrong_signs": wrong}
        | (cancelled(case, taken["two passes"], clean, options) if dtype_of(case) is torch.float64 else {})
    )


def defined_steps(case: Case, options: Options, taken: Mapping[str, Taken]) -> dict[str, definition.Step]:
    """What the definition says about the step of every form, at the δ which that was taken at."""
    groups = definition.Groups(options.groups, case.samples, options.rows == "consecutive")
    delta = taken["two passes"].perturbation
    steps = {"two passes": defined(case, delta, groups)}
    for form in taken.keys() - steps.keys():
        if form == "drop-in":
            found = taken[form].perturbation
            steps[form] = steps["two passes"] if same_shifts(found, delta) else defined(case, found, groups)
        elif "one pass" not in steps:  # both forms of it, but where a loss of all samples cannot be taken apart
            steps["one pass"] = steps["one-pass drop-in"] = defined(case, delta, groups, apart="one pass" in taken)
    return {form: steps[form] for form in taken}


# The forms of the library.


def most_of(case: Case) -> tuple[Options, dict[str, Taken], dict[str, str]]:
    """Take a step in all forms, and where groups of samples are refused, say how rows belong to them, or take none."""
    refused: dict[str, str] = {}
    for options in (Options(), Options(rows="consecutive"), Options(groups=1)):
        taken, errors = all_forms(case, options)
        if "rows=" not in errors.get("two passes", ""):
            break
        refused["groups"] = refused.get("groups", errors["two passes"])
    return options, taken, refused | errors


def all_forms(case: Case, options: Options) -> tuple[dict[str, Taken], dict[str, str]]:
    """A step in every form, and the errors of those that refuse."""
    taken: dict[str, Taken] = {}
    refused: dict[str, str] = {}
    for form in FORMS:
        seeded()
        try:
            taken[form] = STEPS[form](case, options, taken)
        except ApartError as error:
            refused[form] = described(error)
            if form == "two passes":
                break
    return taken, refused


def functional(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The functional step."""
    step = make_apart_step(case.model, case.loss_fn, epsilon=options.epsilon, groups=options.groups, rows=options.rows)
    out = step(*split_state(case.model), case.batch)
    return Taken(out.grads, out.stat_grads, buffers_of(case, out.buffers), out.perturbation)


def functional_one_pass(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The functional step of one pass, at the δ that the step of two passes has found."""
    step = make_one_pass_step(
        case.model,
        case.loss_fn,
        epsilon=options.epsilon,
        groups=options.groups,
        rule=sign_perturbation,
        rows=options.rows,
    )
    out = step(*split_state(case.model), case.batch, before["two passes"].perturbation)
    return Taken(out.grads, out.stat_grads, buffers_of(case, out.buffers), out.perturbation)


def drop_in(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """Both passes of a loop with `backward()`."""
    model = copy.deepcopy(case.model)
    apart = APART(model, options.epsilon, options.groups, rows=options.rows)
    for context in (apart.to_proxy, apart.to_adver):
        with context():
            (0.5 * definition.loss_of(model, case.loss_fn, case.batch)).backward()
    stat_grads = {layer: Shift(*(2 * part for part in g)) for layer, g in apart.stat_grads.items()}
    return Taken(left_in(model), stat_grads, dict(model.named_buffers()), apart.perturbation)


def drop_in_one_pass(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The one pass of a loop with `backward()`, at the δ that the step of two passes has found."""
    model = copy.deepcopy(case.model)
    apart = APART(model, options.epsilon, options.groups, rule=sign_perturbation, rows=options.rows)
    apart.load_state_dict({"perturbation": {k: tuple(v) for k, v in before["two passes"].perturbation.items()}})
    with apart.one_pass():
        definition.loss_of(model, case.loss_fn, case.batch).backward()
    apart.state_dict()  # finds the next perturbation
    return Taken(left_in(model), apart.stat_grads, dict(model.named_buffers()), apart.perturbation)


STEPS: dict[str, Callable[[Case, Options, Mapping[str, Taken]], Taken]] = {
    "two passes": functional,
    "drop-in": drop_in,
    "one pass": functional_one_pass,
    "one-pass drop-in": drop_in_one_pass,
}


def buffers_of(case: Case, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a step, without the frozen parameters, which it returns with them."""
    return {name: buffers[name] for name, _ in case.model.named_buffers()}


def left_in(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that `backward()` has left, zero where there are none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained(model).items()}


# What they are compared with.


class Plain(NamedTuple):
    """A step of plain training, by PyTorch.

    Attributes:
        grads: by parameter.
        buffers: after it.
        is_double: whether all of the forward was in float64.
    """

    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    is_double: bool


class _Dtypes(TorchDispatchMode):
    """Notes whether an operator made a tensor that is less precise than float64, and no constant."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.is_double = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float16, torch.bfloat16) and out.dim():
            self.is_double = False
        return out


def plain_step(case: Case) -> Plain:
    """Train as everybody does."""
    seeded()
    model, dtypes = copy.deepcopy(case.model), _Dtypes()
    with dtypes:
        loss = definition.loss_of(model, case.loss_fn, case.batch)
    loss.backward()
    return Plain(left_in(model), dict(model.named_buffers()), dtypes.is_double)


def defined(
    case: Case, delta: Mapping[str, Any], groups: definition.Groups, apart: bool | None = None
) -> definition.Step:
    """A step by the definition: of two passes, or of one."""
    seeded()
    shifts = {name: Shift(*pair) for name, pair in delta.items()}
    if apart is None:
        return definition.two_passes(case.model, case.loss_fn, case.batch, shifts, groups)
    return definition.one_pass(case.model, case.loss_fn, case.batch, shifts, groups, CLEAN, apart)


def errors_of(taken: Taken, step: definition.Step) -> dict[str, float]:
    """How far a step is from the definition's."""
    return {
        "gradients": largest_error(taken.grads, step.grads),
        "statistic gradients": largest_error(flat(taken.stat_grads), flat(step.stat_grads)),
        "running statistics": largest_error(taken.buffers, step.buffers),
    }


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of a tensor; infinite where names, shapes or integers differ, or a value is none."""
    if actual.keys() != expected.keys() or any(actual[name].shape != expected[name].shape for name in expected):
        return float("inf")
    real = {name for name, value in expected.items() if value.is_floating_point() or value.is_complex()}
    if not all(torch.equal(actual[name], expected[name]) for name in expected.keys() - real):
        return float("inf")
    pairs = {name: finite_parts(actual[name].detach(), expected[name].detach()) for name in real}
    norms = {name: value.norm().item() for name, (_, value) in pairs.items()}
    least = LEAST_NORM * max(norms.values(), default=0.0)
    errors = [
        (found - value).norm().item() / (max(norms[name], least) or 1.0) for name, (found, value) in pairs.items()
    ]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def finite_parts(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with zeros where one infinity is expected and found, such as the range of an observer without data."""
    same = (actual == expected) & expected.isinf()
    return actual.masked_fill(same, 0), expected.masked_fill(same, 0)


def flat(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """A tree by layer as one by layer and statistic."""
    return {f"{layer}.{kind}": part for layer, pair in tree.items() for kind, part in zip("μσ", pair, strict=True)}


def same_shifts(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two perturbations are the same."""
    return all(torch.equal(part, flat(other)[name]) for name, part in flat(one).items())


def wrong_signs(taken: Taken, step: definition.Step, tolerance: float) -> int:
    """How many components of δ are not ε · sign(g), where the sign of g is no matter of rounding.

    That is where its terms do not cancel, and where it is more than `tolerance` of the layer's largest.
    """
    terms, found = flat(step.terms), flat(taken.perturbation)
    wrong = 0
    for name, g in flat(step.stat_grads).items():
        clear = (g.abs() > CLEAR * terms[name]) & (g.abs() > tolerance * g.abs().max())
        expected = torch.tensor(RADIUS, dtype=found[name].dtype) * g.sign()
        wrong += int((found[name] != expected.to(found[name].dtype))[clear].sum())
    return wrong


# Statistic gradients that are zero but for rounding.


def cancelled(case: Case, taken: Taken, step: definition.Step, options: Options) -> Row:
    """How many there are, and what their random signs do to the gradient of the second pass.

    Args:
        case: in float64.
        taken: the step of two passes.
        step: the same by the definition.
        options: of the step.

    Returns:
        Their share; the change of the second pass's gradient where they alone are perturbed, where they alone are not,
        and where as many others, drawn by lot, are not.
    """
    delta, zero = flat(taken.perturbation), zero_but_for_rounding(taken, step)
    count, total = (sum(int(kind(part)) for part in zero.values()) for kind in (torch.sum, torch.numel))
    row: Row = {"cancelled": count / total}
    if not count:
        return row
    seeded()
    others = {name: ~part & (torch.rand(part.shape) < count / (total - count)) for name, part in zero.items()}
    fmodel, state = functionalize(case.model), split_state(case.model)

    def pass_at(flat_delta: Mapping[str, Tensor]) -> AdversarialOutput:
        seeded()
        tree = {name: Perturbation(flat_delta[f"{name}.μ"], flat_delta[f"{name}.σ"]) for name in taken.perturbation}
        rows, groups = options.rows, options.groups
        return adversarial_pass(fmodel, case.loss_fn, *state, case.batch, tree, groups=groups, rows=rows)

    nothing = pass_at({name: 0 * part for name, part in delta.items()})
    alone = pass_at({name: part * zero[name] for name, part in delta.items()})
    everything = pass_at(delta)
    without = pass_at({name: part * ~zero[name] for name, part in delta.items()})
    without_others = pass_at({name: part * ~others[name] for name, part in delta.items()})
    return row | {
        "alone": distance(alone.grads, nothing.grads),
        "without": distance(without.grads, everything.grads),
        "without_others": distance(without_others.grads, everything.grads),
        "rises": [(each.loss - nothing.loss).item() for each in (alone, everything, without, without_others)],
    }


def zero_but_for_rounding(taken: Taken, step: definition.Step) -> dict[str, Tensor]:
    """Which statistic gradients are, in float64: their terms cancel."""
    terms = flat(step.terms)
    return {name: (g != 0) & (g.abs() <= CANCELS * terms[name]) for name, g in flat(taken.stat_grads).items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖one − other‖/‖other‖ over all tensors together."""
    difference = sum((one[name] - other[name]).square().sum().item() for name in other)
    return float((difference / sum(tensor.square().sum().item() for tensor in other.values())) ** 0.5)


# Small things.


def seeded() -> None:
    """Begin all sources of random numbers anew: dropout draws the same masks in every form."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same case in another precision."""
    batch = definition.mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, list(case.batch))
    model = copy.deepcopy(case.model).to(dtype)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):  # it takes a step of quantisation in single precision alone
            module.scale = module.scale.float()
    return case._replace(model=model, batch=tuple(batch))


def dtype_of(case: Case) -> torch.dtype:
    """The precision of a case."""
    return next(parameter.dtype for parameter in case.model.parameters() if parameter.is_floating_point())


def described(error: Exception) -> str:
    """Class and message of an error, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
