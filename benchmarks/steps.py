"""The training steps that are measured: `make_step(choice, case)` returns a function to call.

A step computes loss, gradients and running statistics of one batch. The optimizer's update, the same for all, is left
out; SAM's steps contain what they do to the weights between their two passes.

    plain             zero_grad, forward, loss, backward
    plain compiled    the same: model and loss compiled into one function, whose backward AOTAutograd compiles as well
    plain one graph   forward and backward by torch.func.grad_and_value in one compiled function: the honest floor
    APART             the functional step                      APART compiled: the same in one graph
    APART drop-in     to_proxy() and to_adver() around two ordinary passes
    one pass          the functional step in one pass          one pass compiled: the same in one graph
    one pass drop-in  one_pass() around an ordinary pass
    APART-SAM         the functional step of APART-SAM
    SAM               pytorch_optimizer's, around two ordinary passes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from networks import NETWORKS, Case
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from apart_func import (
    APART,
    ApartStep,
    OnePassStep,
    StepOutput,
    init_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    sign_perturbation,
    split_state,
)

Step = Callable[[], object]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
Tensors = dict[str, Tensor]

# One graph or an error: a step in pieces would be measured for something else, and so would one for any batch size.
ONE_GRAPH: partial[Callable[..., Any]] = partial(torch.compile, fullgraph=True, dynamic=False)

RADIUS = 0.1
RHO = 0.05


class Variant(NamedTuple):
    """Settings of the adversarial pass that its cost depends on.

    Attributes:
        ratio: share of the batch that goes through it.
        groups: ghost groups in it.
    """

    ratio: float = 1.0
    groups: int = 0


def plain(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """What everyone writes."""
    model, (images, labels) = case

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    return step


def plain_compiled(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """What everyone writes who compiles: forward and backward are a graph each."""
    model, (images, labels) = case
    loss_of = compiler(lambda x, y: F.cross_entropy(model(x), y))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(images, labels).backward()

    return step


def plain_function(model: nn.Module) -> Callable[[Tensors, Tensors, Tensor, Tensor], tuple[Tensors, Tensor, Tensors]]:
    """The plain step as a pure function of parameters, buffers and batch: gradients, loss and new buffers."""

    def loss_of(params: Tensors, buffers: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensors]:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm moves them in place
        return F.cross_entropy(functional_call(model, {**params, **buffers}, (images,)), labels), buffers

    def step(params: Tensors, buffers: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensors, Tensor, Tensors]:
        grads, (loss, moved) = grad_and_value(loss_of, has_aux=True)(params, buffers, images, labels)
        return grads, loss, moved

    return step


def plain_one_graph(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The plain step in the form of the compiled APART step."""
    params, buffers = split_state(case.model)
    compiled = compiler(plain_function(case.model))
    return lambda: compiled(params, buffers, *case.batch)


def apart(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The functional step."""
    return _called(case, _apart_step(case, variant))


def apart_compiled(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The functional step in one graph."""
    return _called(case, compiler(_apart_step(case, variant)))


def apart_drop_in(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """Two contexts in a loop of the usual kind."""
    model, (images, labels) = case
    chosen = int(variant.ratio * len(images))
    weight = len(images) / (len(images) + chosen)
    method = APART(model, epsilon=RADIUS, groups=variant.groups)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with method.to_proxy():
            (weight * F.cross_entropy(model(images), labels)).backward()
        with method.to_adver():
            ((1 - weight) * F.cross_entropy(model(images[:chosen]), labels[:chosen])).backward()

    return step


def one_pass(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The functional step in one pass."""
    return _carried(case, _one_pass_step(case, variant))


def one_pass_compiled(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The same in one graph."""
    return _carried(case, compiler(_one_pass_step(case, variant)))


def one_pass_drop_in(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """One context in a loop of the usual kind."""
    model, (images, labels) = case
    method = APART(model, epsilon=RADIUS, groups=variant.groups, rule=sign_perturbation)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with method.one_pass():
            F.cross_entropy(model(images), labels).backward()

    return step


def apart_sam(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """The functional step that climbs with the weights as well."""
    step = make_apart_sam_step(
        case.model, F.cross_entropy, epsilon=RADIUS, groups=variant.groups, ratio=variant.ratio, rho=RHO
    )
    return _called(case, step)


def sam(case: Case, variant: Variant, compiler: Compiler) -> Step:
    """Sharpness-aware minimization by a package. Its update comes with it, here at a rate of zero."""
    from pytorch_optimizer import SAM  # importing it takes seconds

    model, (images, labels) = case
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.0)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.second_step(zero_grad=True)

    return step


class Method(NamedTuple):
    """A kind of step.

    Attributes:
        make: the step for a case, from its settings and what compiles a function.
        compiled: whether `torch.compile` is part of it.
        varies: the settings that matter to it.
        least_groups: that it can do with.
    """

    make: Callable[[Case, Variant, Compiler], Step]
    compiled: bool = False
    varies: tuple[str, ...] = ()
    least_groups: int = 0


METHODS = {
    "plain": Method(plain),
    "plain compiled": Method(plain_compiled, compiled=True),
    "plain one graph": Method(plain_one_graph, compiled=True),
    "APART": Method(apart, varies=Variant._fields),
    "APART compiled": Method(apart_compiled, compiled=True, varies=Variant._fields),
    "APART drop-in": Method(apart_drop_in, varies=Variant._fields),
    "one pass": Method(one_pass, varies=("groups",), least_groups=2),
    "one pass compiled": Method(one_pass_compiled, compiled=True, varies=("groups",), least_groups=2),
    "one pass drop-in": Method(one_pass_drop_in, varies=("groups",), least_groups=2),
    "APART-SAM": Method(apart_sam, varies=Variant._fields),
    "SAM": Method(sam),
}


class Choice(NamedTuple):
    """One kind of step on one network.

    Attributes:
        model: which network.
        samples: its batch size.
        method: which step.
        variant: its settings; None where it has none.
    """

    model: str
    samples: int
    method: str
    variant: Variant | None = None

    @property
    def name(self) -> str:
        """The step, for a person."""
        return step_name(self.labels())

    def labels(self) -> dict[str, Any]:
        """What a row of results says of the step."""
        labels = {"model": self.model, "samples": self.samples, "method": self.method}
        return labels | {name: getattr(self.variant, name) for name in METHODS[self.method].varies}


def step_name(row: dict[str, Any]) -> str:
    """The step of a row of results, with its settings."""
    return ", ".join([row["method"], *(f"{name} {row[name]:g}" for name in Variant._fields if name in row)])


def setting_cells(row: dict[str, Any]) -> list[str]:
    """Its settings, as the cells of a table."""
    return [f"{row[name]:g}" if name in row else "" for name in Variant._fields]


def choices(
    model: str, samples: int | None, methods: Iterable[str], ratios: Iterable[float], groups: Iterable[int]
) -> list[Choice]:
    """All steps to measure on a network.

    Args:
        model: which network.
        samples: batch size; None takes the network's own.
        methods: which steps.
        ratios: shares of the batch in the adversarial pass.
        groups: ghost groups in it. A small batch gets as many as leave two samples in each.

    Returns:
        Every combination, once.
    """
    samples = samples or NETWORKS[model].samples
    return [
        Choice(model, samples, method, variant)
        for method in methods
        for variant in _variants(METHODS[method], samples, ratios, groups)
    ]


def _variants(method: Method, samples: int, ratios: Iterable[float], groups: Iterable[int]) -> Iterable[Variant | None]:
    if not method.varies:
        return [None]
    shares = ratios if "ratio" in method.varies else [1.0]
    made = [Variant(ratio, min(number, int(ratio * samples) // 2)) for ratio in shares for number in groups]
    return dict.fromkeys(variant for variant in made if variant.groups >= method.least_groups)


def make_step(choice: Choice, case: Case, compiler: Compiler = ONE_GRAPH) -> Step:
    """The step of a choice.

    Args:
        choice: which step.
        case: the network and batch.
        compiler: `torch.compile`, with whatever options.

    Returns:
        The step, to be called again and again.
    """
    return METHODS[choice.method].make(case, choice.variant or Variant(), compiler)


def _apart_step(case: Case, variant: Variant) -> ApartStep:
    return make_apart_step(case.model, F.cross_entropy, epsilon=RADIUS, groups=variant.groups, ratio=variant.ratio)


def _one_pass_step(case: Case, variant: Variant) -> OnePassStep:
    options: dict[str, Any] = {"epsilon": RADIUS, "groups": variant.groups, "rule": sign_perturbation}
    return make_one_pass_step(case.model, F.cross_entropy, **options)


def _carried(case: Case, one_pass_step: Callable[..., StepOutput]) -> Step:
    params, buffers = split_state(case.model)
    perturbation = init_perturbation(case.model)

    def step() -> StepOutput:
        nonlocal perturbation
        out = one_pass_step(params, buffers, case.batch, perturbation)
        perturbation = out.perturbation
        return out

    return step


def _called(case: Case, step: Callable[..., object]) -> Step:
    params, buffers = split_state(case.model)
    return lambda: step(params, buffers, case.batch)
