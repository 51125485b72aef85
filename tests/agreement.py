"""A step by the library and by the definition, and how far they are apart.

A comparison has two parts. What the proxy pass yields is compared as it is. The adversarial pass is compared *given
the library's δ*: where a statistic gradient is zero but for rounding, its sign is a coin toss, and nothing after it
could agree.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import Step, oracle_step
from torch import Tensor, nn

from apart_func import StepOutput, make_apart_step, split_state

# Largest ‖difference‖/‖expected‖ over a whole tree, by dtype of the model. The definition runs in float64 on the very
# same values, so the difference is what rounding has done to the library: typically 3e-16, 2e-7 and 4e-3. The worst of
# some thousand architectures had a layer with hardly any variance, which enlarges rounding (plain training's as well):
# 2e-10, 8e-5 and 9e-2 there.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1}


class Comparison(NamedTuple):
    """One step twice: by the library, and by the definition with the library's δ."""

    library: StepOutput
    definition: Step
    epsilon: float
    tolerance: float


def functional_step(model: nn.Module, batch: Any, *, loss_fn: Any = F.cross_entropy, **options: Any) -> StepOutput:
    """A functional step of two passes from the model's own state."""
    return make_apart_step(model, loss_fn, **options)(*split_state(model), batch)


def take_step(
    model: nn.Module,
    batch: Any,
    take: Callable[..., StepOutput] = functional_step,
    tolerance: float = TOLERANCE[torch.float64],
    **options: Any,
) -> Comparison:
    """A step of the model from its own state, in some form and by the definition."""
    options = {"loss_fn": F.cross_entropy, "epsilon": 0.1, "groups": 0, "ratio": 1.0, "rows": None} | options
    untouched = copy.deepcopy(model)
    library = take(model, batch, **options)
    definition = oracle_step(untouched, batch=batch, perturbation=library.perturbation, **options)
    return Comparison(library, definition, options["epsilon"], tolerance)


def assert_agree(step: Comparison) -> None:
    """Everything a step returns is what the definition returns."""
    library, definition, _, tolerance = step
    for field in ("loss", "output", "buffers", "stats", "stat_grads", "adversarial_loss", "grads"):
        error = relative_error(getattr(library, field), getattr(definition, field))
        assert error <= tolerance, f"{field} is off by {error:.1e}"
    assert_pushed_uphill(step)


def assert_pushed_uphill(step: Comparison) -> None:
    """δ is ε · sign(g), wherever the sign of g is no matter of rounding."""
    library, definition, epsilon, tolerance = step
    gradients, perturbation = flatten(definition.stat_grads), flatten(library.perturbation)
    assert perturbation.keys() == gradients.keys()
    noise = tolerance * sum(g.square().sum() for g in gradients.values()) ** 0.5  # what `relative_error` lets pass
    for key, g in gradients.items():
        clear = g.abs() > noise
        # The library holds ε in δ's dtype, float32 at the least.
        radius = torch.tensor(epsilon, dtype=perturbation[key].dtype).double()
        assert torch.equal(perturbation[key].double()[clear], radius * g.sign()[clear]), key


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual − expected‖/‖expected‖ over all tensors, after a look at keys, shapes, and integers (which are exact)."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    difference = norm = 0.0
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        if not value.is_floating_point():
            assert torch.equal(actual[key], value), key
            continue
        difference += (actual[key].double() - value).square().sum().item()
        norm += value.square().sum().item()
    return (difference / norm) ** 0.5 if norm else difference**0.5


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a tree, keyed by its path."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else tree._asdict().items()
    return {path: leaf for key, value in items for path, leaf in flatten(value, f"{prefix}/{key}").items()}
