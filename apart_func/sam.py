"""APART-SAM: the adversarial pass perturbs the weights as well as the statistics.

    proxy pass at θ                              →  ∇L_p, and δ as always
    adversarial pass at θ + ρ ∇L_p / ‖∇L_p‖      →  ∇L_a, with the statistics pushed by δ
    gradient                                        r ∇L_p + (1 − r) ∇L_a

The weight r of the proxy gradient cancels in its direction.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from apart_func.errors import SettingError
from apart_func.functional import FunctionalModel, LossFunction
from apart_func.kernels import statistics_dtype
from apart_func.perturbation import Rule, sign_perturbation
from apart_func.pytrees import Tensors
from apart_func.step import ApartStep, make_step_at


def make_apart_sam_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    rho: float = 0.05,
    remainder: Literal["error", "drop"] = "error",
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    autocast_dtype: torch.dtype | None = None,
) -> ApartStep:
    """Make the training step of APART-SAM; at `rho=0` it is that of `make_apart_step`.

    Args:
        model: as in `make_apart_step`.
        loss_fn: as there.
        epsilon: as there.
        groups: as there.
        ratio: as there.
        rho: radius ρ ≥ 0 of the weight perturbation, in the norm over all of `params` together.
        remainder: as there.
        microbatches: as there; each micro-batch climbs by its own gradient.
        rule: as there.
        autocast_dtype: as there.

    Returns:
        `apart_sam_step(params, buffers, batch, *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    if not (math.isfinite(rho) and rho >= 0):
        raise SettingError(f"rho={rho}; expected a finite radius ≥ 0, such as 0.05.")

    point = partial(climb, rho=rho)
    return make_step_at(point, model, loss_fn, epsilon, groups, ratio, remainder, microbatches, rule, autocast_dtype)


def climb(params: Tensors, grads: Tensors, rho: float) -> Tensors:
    """θ + ρ g/‖g‖, with the norm over all tensors together, or θ where the gradient is zero."""
    norm = global_norm(grads)
    length = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return {name: param + length.to(param.dtype) * grads[name] for name, param in params.items()}


def global_norm(tensors: Tensors) -> Tensor:
    """The Euclidean norm of all tensors together, 0-d, in at least float32."""
    squares = [tensor.to(statistics_dtype(tensor.dtype)).square().sum() for tensor in tensors.values()]
    return torch.sqrt(sum(squares, torch.zeros_like(squares[0])))
