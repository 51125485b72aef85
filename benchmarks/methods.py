"""The training steps that are measured: `METHODS["two passes"](case, groups)` returns a function to call.

A step computes the loss, gradients and running statistics of one batch. The optimizer's update, the same for all, is
left out; SAM's steps contain what they do to the weights between their two passes.

    plain                       zero_grad, forward, loss, backward
    plain functional            the same by torch.func.grad_and_value, a pure function
    two passes                  the functional step             two passes, drop-in    to_proxy() and to_adver()
    one pass                    random signs, drawn in the step  one pass, drop-in      one_pass()
    one pass, gradient's signs  those of the step before
    APART-SAM                   the functional step             SAM                    that of pytorch_optimizer
    eight models                two passes of eight models      eight models, mapped   the same under vmap

Those of `COMPILED` are one graph for `torch.compile`, but for "plain, compiled": a graph of model and loss, and its
backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import Case
from timing import seconds_a_call
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils._pytree import tree_map

import apart_func
from apart_func import APART, make_apart_sam_step, make_apart_step, make_one_pass_step, split_state

Step = Callable[[], object]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

# One graph or an error: a step in pieces would be measured for something else, and so would one for any batch size.
ONE_GRAPH: partial[Callable[..., Any]] = partial(torch.compile, fullgraph=True, dynamic=False)
RADIUS = 0.1
RHO = 0.05


# Steps in the form of a loop with `backward()`.


def plain(case: Case, groups: int, loss_of: Callable[..., Tensor] | None = None) -> Step:
    """What everyone writes."""
    model, (images, labels) = case
    loss_of = loss_of or (lambda x, y: F.cross_entropy(model(x), y))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(images, labels).backward()

    return step


def plain_compiled(case: Case, groups: int, compiler: Compiler = ONE_GRAPH) -> Step:
    """What everyone writes who compiles."""
    return plain(case, groups, compiler(lambda x, y: F.cross_entropy(case.model(x), y)))


def two_passes_drop_in(case: Case, groups: int) -> Step:
    """Two contexts around ordinary passes."""
    model, (images, labels) = case
    method = APART(model, epsilon=RADIUS, groups=groups)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with method.to_proxy():
            (0.5 * F.cross_entropy(model(images), labels)).backward()
        with method.to_adver():
            (0.5 * F.cross_entropy(model(images), labels)).backward()

    return step


def one_pass_drop_in(case: Case, groups: int) -> Step:
    """One context around an ordinary pass."""
    model, (images, labels) = case
    method = APART(model, epsilon=RADIUS, groups=groups)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with method.one_pass():
            F.cross_entropy(model(images), labels).backward()

    return step


def sam(case: Case, groups: int) -> Step:
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


# Steps as pure functions of (params, buffers, batch).


def plain_function(case: Case, groups: int) -> Callable[..., Any]:
    """The plain step: gradients, loss and new buffers."""

    def loss_of(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm moves them in place
        return F.cross_entropy(functional_call(case.model, {**params, **buffers}, batch[:1]), batch[1]), buffers

    return grad_and_value(loss_of, has_aux=True)


def two_passes(case: Case, groups: int) -> Callable[..., Any]:
    """The functional step."""
    return make_apart_step(case.model, F.cross_entropy, epsilon=RADIUS, groups=groups)


def one_pass(case: Case, groups: int, **options: Any) -> Callable[..., Any]:
    """The functional step in one pass."""
    return make_one_pass_step(case.model, F.cross_entropy, epsilon=RADIUS, groups=groups, **options)


def apart_sam(case: Case, groups: int) -> Callable[..., Any]:
    """The functional step that moves the weights as well before its second pass."""
    return make_apart_sam_step(case.model, F.cross_entropy, epsilon=RADIUS, groups=groups, rho=RHO)


FUNCTIONAL: dict[str, Callable[[Case, int], Callable[..., Any]]] = {
    "plain functional": plain_function,
    "two passes": two_passes,
    "one pass": one_pass,
    "APART-SAM": apart_sam,
}


def functional(case: Case, groups: int, name: str, compiler: Compiler = lambda function: function) -> Step:
    """The step of a pure function: eager, or compiled."""
    step, state = compiler(FUNCTIONAL[name](case, groups)), split_state(case.model)
    return lambda: step(*state, case.batch)


def one_pass_carried(case: Case, groups: int) -> Step:
    """One pass by the signs of the gradient of the step before."""
    step, state = one_pass(case, groups, rule=apart_func.sign_perturbation), split_state(case.model)
    perturbation = apart_func.init_perturbation(case.model)

    def carried() -> None:
        nonlocal perturbation
        perturbation = step(*state, case.batch, perturbation).perturbation

    return carried


# Many models.


def eight(case: Case, groups: int, mapped: bool, compiler: Compiler = lambda function: function) -> Step:
    """A step of two passes of eight models on one batch, one by one or under vmap."""
    step = two_passes(case, groups)
    models: list[nn.Module] = [copy.deepcopy(case.model) for _ in range(8)]
    if mapped:
        state = tree_map(torch.detach, stack_module_state(models))
        together = compiler(vmap(step, in_dims=(0, 0, None)))
        return lambda: together(*state, case.batch)
    states, compiled = [split_state(model) for model in models], compiler(step)
    return lambda: [compiled(*state, case.batch) for state in states]


Method = Callable[[Case, int], Step]
METHODS: dict[str, Method] = {
    "plain": plain,
    "two passes": partial(functional, name="two passes"),
    "one pass": partial(functional, name="one pass"),
    "two passes, drop-in": two_passes_drop_in,
    "one pass, drop-in": one_pass_drop_in,
    "SAM": sam,
    "APART-SAM": partial(functional, name="APART-SAM"),
    "one pass, gradient's signs": one_pass_carried,
    "plain functional": partial(functional, name="plain functional"),
    "eight models": partial(eight, mapped=False),
    "eight models, mapped": partial(eight, mapped=True),
}
COMPILED: dict[str, Method] = {
    "plain, compiled": plain_compiled,
    **{f"{name}, compiled": partial(functional, name=name, compiler=ONE_GRAPH) for name in FUNCTIONAL},
    "eight models, compiled": partial(eight, mapped=False, compiler=ONE_GRAPH),
    "eight models, mapped, compiled": partial(eight, mapped=True, compiler=ONE_GRAPH),
}

# In a process that measures: its steps by name.
PREPARED: dict[str, Step] = {}


def prepare(case: Case, methods: list[str], groups: int) -> None:
    """Make steps in this process and call each twice, which compiles those that compile."""
    PREPARED.clear()
    for name in methods:
        PREPARED[name] = (METHODS | COMPILED)[name](case, groups)
        PREPARED[name]()
        PREPARED[name]()


def time_prepared(name: str, seconds: float, device: str) -> float:
    """Time a prepared step: its seconds a call."""
    return seconds_a_call(PREPARED[name], seconds, device)
