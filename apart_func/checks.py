"""What is refused, and how: the checks of arguments and settings, each with its message.

A message says what was given, what was expected, and how to mend it. Values are checked if they can be read without
waiting for a device; under a transform a bad radius makes `all_finite` False.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from apart_func._torch import is_concrete
from apart_func.errors import SettingError


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, of Python or numpy, and no bool."""
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))


def is_count(value: Any) -> bool:
    """Return whether a value is an integer, of Python or numpy, and no bool."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_rule(rule: Any) -> None:
    """Raise a SettingError if a rule cannot be called."""
    if not callable(rule):
        expected = "expected a function (stats, stat_grads, epsilon) -> perturbation, such as sign_perturbation"
        raise SettingError(f"rule={rule!r}; {expected}.")


def check_epsilon(epsilon: Any, is_bounded: bool) -> None:
    """Raise a SettingError if a number or tensor is no radius, or is 1 or more under a rule that is bounded by it."""
    if isinstance(epsilon, Tensor):
        if epsilon.dim():
            sweep = "vmap(lambda e: apart_step(params, buffers, batch, epsilon=e))(epsilons)"
            expected = f"expected a number or 0-d tensor. For a sweep, use {sweep}"
            raise SettingError(f"epsilon has shape {tuple(epsilon.shape)}; {expected}.")
        if not is_concrete(epsilon) or epsilon.device.type != "cpu":
            return
        epsilon = epsilon.item()
    if not is_number(epsilon):
        raise SettingError(f"epsilon={epsilon!r}; expected a number, such as 0.1, or a 0-d tensor.")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise SettingError(f"epsilon={epsilon}; expected a finite radius ≥ 0, such as 0.1.")
    if is_bounded and epsilon >= 1:
        problem = "a rule of signs moves every statistic by ε, and s' = s/(1 + δσ) needs |δσ| < 1"
        raise SettingError(f"epsilon={epsilon}; {problem}. Use a radius below 1, such as 0.1.")


def check_radius(name: str, value: Any) -> None:
    """Raise a SettingError if a setting is no finite number ≥ 0."""
    if not (is_number(value) and 0 <= value < math.inf):
        raise SettingError(f"{name}={value!r}; expected a finite radius ≥ 0, such as 0.05.")


def scalar(value: Any, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a setting as a 0-d tensor that nothing is differentiated by; raise a SettingError if it is no number."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.detach().to(device=device, dtype=dtype)
    if not is_number(value):
        raise SettingError(f"{name}={value!r}; expected a number or 0-d tensor.")
    return torch.full((), value, dtype=dtype, device=device)


def check_clean(clean: Any, groups: int) -> None:
    """Raise a SettingError if so many clean groups leave no group of one kind."""
    if not is_count(clean) or not 0 < clean < groups:
        raise SettingError(f"clean={clean!r} of {groups} groups; expected at least one, and less than all of them.")


def clean_groups(clean_fraction: float, groups: int) -> int:
    """Return how many of G ghost groups are clean; raise a SettingError if that is none or all of them."""
    clean = round(clean_fraction * groups)
    if not 0 < clean < groups:
        which = "none" if clean <= 0 else "all"
        raise SettingError(
            f"groups={groups} and clean_fraction={clean_fraction} make {which} of the groups clean; expected at least "
            "one that is, and one that is not. Use groups=2 or more, and a fraction such as 0.5."
        )
    return clean


def check_perturbation(layers: Mapping[str, int], perturbation: Any, groups: int) -> None:
    """Raise a SettingError if a layer, given with its channels, has no perturbation of `(C,)` or `(groups, C)`."""
    check_layers(layers, perturbation)
    for name, channels in layers.items():
        parts = perturbation[name]
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            given = f"{len(parts)} parts" if isinstance(parts, (tuple, list)) else f"a {type(parts).__name__}"
            expected = "expected (mean, scale), as Perturbation"
            raise SettingError(f"the perturbation of layer {name!r} is {given}; {expected}.")
        for shift in parts:
            shape = tuple(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
            if shape not in ((channels,), (groups, channels)):
                expected = f"expected ({channels},), or ({groups}, {channels}) for one in each group"
                raise SettingError(f"the perturbation of layer {name!r} has shape {shape}; {expected}.")


def check_layers(layers: Iterable[str], perturbation: Any) -> None:
    """Raise a SettingError if a perturbation is not one of these layers."""
    if not isinstance(perturbation, Mapping):
        expected = "expected a dict by layer, as of init_perturbation"
        raise SettingError(f"the perturbation is a {type(perturbation).__name__}; {expected}.")
    missing, unexpected = sorted(set(layers) - set(perturbation)), sorted(set(perturbation) - set(layers))
    if missing or unexpected:
        problem = f"the perturbation does not fit the model's BN layers: missing {missing}, unexpected {unexpected}"
        raise SettingError(f"{problem}. A rule returns one entry for every layer in stat_grads.")
