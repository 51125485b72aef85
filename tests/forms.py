"""A step of every form, for tests of what all forms do.

`make(form, model)` is a function of a batch, for tests that are about where a step runs:

    two passes, one pass    the functional steps; that of one pass carries a perturbation
    drop-in                 to_proxy() and to_adver() around two ordinary passes
    one-pass drop-in        one_pass() around one, at random signs

`STEPS[kind](model, ...)` is a functional step of two groups, and `step(params, buffers, batch, *more_of(kind, model))`
takes it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apart_func import (
    APART,
    init_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    random_signs,
    sign_perturbation,
    split_state,
)

FORMS = ("two passes", "one pass", "drop-in", "one-pass drop-in")
GROUPS = 4
RADIUS = 0.1


def make(form: str, model: nn.Module, autocast_dtype: torch.dtype | None = None, epsilon: float = RADIUS) -> Any:
    """A function of a batch that takes a step from the same state each time, and returns the gradients by name.

    Args:
        form: one of `FORMS`.
        model: in training mode.
        autocast_dtype: of the region around each forward; None opens none.
        epsilon: the radius.
    """
    if "drop-in" in form:
        return _drop_in(form, model, autocast_dtype, epsilon)
    options: dict[str, Any] = {"epsilon": epsilon, "groups": GROUPS, "autocast_dtype": autocast_dtype}
    params, buffers = split_state(model)
    if form == "two passes":
        step = make_apart_step(model, F.cross_entropy, **options)
        return lambda batch: step(params, buffers, batch)
    one_pass_step = make_one_pass_step(model, F.cross_entropy, rule=sign_perturbation, **options)
    before = init_perturbation(model)
    return lambda batch: one_pass_step(params, buffers, batch, before)


two_groups: dict[str, Any] = {"loss_fn": F.cross_entropy, "groups": 2}
STEPS: dict[str, Callable[..., Any]] = {
    "two passes": partial(make_apart_step, **two_groups),
    "APART-SAM": partial(make_apart_sam_step, ratio=0.5, rho=0.3, **two_groups),
    "one pass": partial(make_one_pass_step, epsilon=0.1, rule=sign_perturbation, **two_groups),
}


def more_of(kind: str, model: nn.Module) -> tuple[Any, ...]:
    """The perturbation that a step of one pass carries."""
    generator = torch.Generator().manual_seed(0)
    return (random_signs(init_perturbation(model), 0.2, generator),) if kind == "one pass" else ()


def grads_of(out: Any) -> dict[str, Tensor]:
    """The gradients in what a step returned."""
    return out if isinstance(out, dict) else out.grads


def _drop_in(form: str, model: nn.Module, autocast_dtype: torch.dtype | None, epsilon: float) -> Any:
    method = APART(model, epsilon=epsilon, groups=GROUPS)
    device = next(model.parameters()).device.type

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if autocast_dtype is None else torch.autocast(device, autocast_dtype)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast():
            return F.cross_entropy(model(batch[0]), batch[1])

    def two(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with method.to_proxy():
            (0.5 * loss_of(batch)).backward()
        with method.to_adver():
            (0.5 * loss_of(batch)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def one(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with method.one_pass():
            loss_of(batch).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    return two if form == "drop-in" else one
