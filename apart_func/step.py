"""The method: a proxy pass, a perturbation, an adversarial pass, and the weighted sum of both gradients.

    proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch)                        # ∇L_p, and g = ∂L_p/∂δ
    δ     = sign_perturbation(proxy.stats, proxy.stat_grads, epsilon)                  # ε · sign(g)
    adver = adversarial_pass(fmodel, loss_fn, params, buffers, first N samples, δ)     # ∇L_a at δ
    grads = r ∇L_p + (1 − r) ∇L_a                                                      # r = M / (M + N)

`make_apart_step` puts the four lines into one function; everything it does can be done by hand with these parts.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from apart_func.autodiff import is_traced
from apart_func.batch_norm import number_of_groups
from apart_func.errors import BatchError, SettingError
from apart_func.functional import FunctionalModel, LossFunction, functionalize
from apart_func.passes import Precision, adversarial_pass, gradients_at, proxy_pass, statistics_like
from apart_func.perturbation import Rule, check_epsilon, perturbation_by, sign_perturbation
from apart_func.pytrees import (
    StepOutput,
    Tensors,
    batch_size,
    concatenate_trees,
    constant,
    cut_batch,
    merge_trees,
    stack_trees,
    vectors,
)


class ApartStep(Protocol):
    """One training step as a function; see `make_apart_step`."""

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            epsilon: overrides the radius for this call; a 0-d tensor that changes does not recompile.
            loss_scale: factor on both losses during their backward, divided out of all gradients.
        """


def make_apart_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    remainder: Literal["error", "drop"] = "error",
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    autocast_dtype: torch.dtype | None = None,
) -> ApartStep:
    """Make the training step of APART: a pure function of parameters, buffers and batch.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`, a mean over samples if r is to weigh both passes as the method says.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic.
        groups: ghost groups G of the adversarial pass: 0 and 1 one group, -1 a group for every sample.
        ratio: N = int(ratio · M) of the M samples go through the adversarial pass, the first ones.
        remainder: what to do where G does not divide N: "error", or "drop" to lower N to a multiple of G.
        microbatches: k parts of the batch, one after another; each runs both passes with its own N and δ.
        rule: makes the perturbation from statistics and their gradients. `multi_step(k)` runs k − 1 passes more.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.

    Returns:
        `apart_step(params, buffers, batch, *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    return make_step_at(
        _where_it_is, model, loss_fn, epsilon, groups, ratio, remainder, microbatches, rule, autocast_dtype
    )


Tree = TypeVar("Tree")

# From the parameters and ∇L_p to the parameters at which the adversarial pass is taken.
Point = Callable[[Tensors, Tensors], Tensors]


def _where_it_is(params: Tensors, grads: Tensors) -> Tensors:
    return params


def make_step_at(
    point: Point,
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    epsilon: float | Tensor,
    groups: int,
    ratio: float,
    remainder: str,
    microbatches: int,
    rule: Rule,
    autocast_dtype: torch.dtype | None,
) -> ApartStep:
    """`make_apart_step`, with the adversarial pass at a point of its own; both gradients still add up."""
    fmodel = model if isinstance(model, FunctionalModel) else functionalize(model)
    check_epsilon(epsilon)
    number_of_groups(min(groups, 1), 1)
    _check_settings(ratio, remainder)
    check_microbatches(microbatches)
    default_epsilon = epsilon

    def one_batch(
        params: Tensors, buffers: Tensors, batch: tuple[Any, Any], radius: Tensor, precision: Precision
    ) -> StepOutput:
        samples = batch_size(batch)
        chosen = _adversarial_samples(samples, ratio, groups, remainder)
        proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch, precision=precision)
        further = partial(gradients_at, fmodel, loss_fn, params, buffers, batch, precision=precision)
        perturbation = constant(perturbation_by(rule, proxy.stats, proxy.stat_grads, radius, further))
        adversarial = adversarial_pass(
            fmodel,
            loss_fn,
            point(params, proxy.grads),
            proxy.buffers,
            cut_batch(batch, 0, chosen),
            perturbation,
            groups=groups,
            precision=precision,
        )
        grads = _interpolate(proxy.grads, adversarial.grads, chosen / (samples + chosen))
        # A gradient of either pass that is not finite leaves its mark on their sum.
        values = [proxy.loss, adversarial.loss, radius, *grads.values(), *vectors(proxy.stat_grads)]
        return StepOutput(
            grads=grads,
            buffers=proxy.buffers,
            loss=proxy.loss,
            adversarial_loss=adversarial.loss,
            output=proxy.output,
            stats=proxy.stats,
            stat_grads=proxy.stat_grads,
            perturbation=perturbation,
            all_finite=all_finite(values) & (radius >= 0),
        )

    def apart_step(
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        if epsilon is not None:
            check_epsilon(epsilon)
        radius = default_epsilon if epsilon is None else epsilon
        like = statistics_like({**params, **buffers})
        radius = scalar(radius, like.dtype, like.device)
        precision = Precision(
            autocast_dtype, None if loss_scale is None else scalar(loss_scale, torch.float32, like.device)
        )
        return over_microbatches(
            lambda moved, part: one_batch(params, moved, part, radius, precision), buffers, batch, microbatches
        )

    return apart_step


def over_microbatches(
    one_batch: Callable[[Tensors, Any], StepOutput], buffers: Tensors, batch: Any, microbatches: int
) -> StepOutput:
    """Run a step on the parts of a batch, one after another.

    Args:
        one_batch: the step, from buffers and a part; the buffers it returns go to the next part.
        buffers: for the first part.
        batch: `(input, target)`, of which every part gets an equal share.
        microbatches: number of parts.

    Returns:
        One output for all of them. Where something is not finite, its buffers are those that came in.

    Raises:
        BatchError: the batch cannot be cut into so many parts.
    """
    outputs, moved = [], buffers
    for part in _parts(batch, microbatches):
        outputs.append(one_batch(moved, part))
        moved = outputs[-1].buffers
    out = outputs[0] if microbatches == 1 else _mean_output(outputs)
    return out._replace(buffers=chosen(out.all_finite, out.buffers, buffers))


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A setting as a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _interpolate(start: Tensors, end: Tensors, weight: float) -> Tensors:
    """(1 − weight) · start + weight · end."""
    if is_traced():  # foreach kernels know no vmap, and compilers fuse without them
        return {name: torch.lerp(grad, end[name], weight) for name, grad in start.items()}
    ends = [end[name] for name in start]
    return dict(zip(start, torch._foreach_lerp(list(start.values()), ends, weight), strict=True))


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no tensor holds an infinity or NaN, as a 0-d bool."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if is_traced():
        return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    # A NaN is the least and the greatest of the values that it is among. One kernel for all tensors.
    with torch.no_grad():
        least, greatest = torch.aminmax(torch.cat([tensor.flatten() for tensor in tensors]))
    return least.isfinite() & greatest.isfinite()


def chosen(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` where the condition holds, else `old`, leaf by leaf; the host waits for no device."""
    if condition.device.type == "cpu" and not is_traced():
        return new if condition else old

    def of_leaf(pair: list[Tensor]) -> Tensor:
        return pair[0] if pair[0] is pair[1] else torch.where(condition, pair[0], pair[1])

    tree: Tree = merge_trees([new, old], of_leaf)
    return tree


def _parts(batch: Any, microbatches: int) -> list[Any]:
    if microbatches == 1:
        return [batch]
    samples = batch_size(batch)
    if samples % microbatches:
        raise BatchError(
            f"microbatches={microbatches} does not divide the batch of {samples} samples. Use a divisor, and "
            "drop_last=True in the data loader."
        )
    size = samples // microbatches
    return [cut_batch(batch, start, start + size) for start in range(0, samples, size)]


def _mean_output(outputs: list[StepOutput]) -> StepOutput:
    """One output for all micro-batches: means of losses and gradients, the rest joined."""
    return StepOutput(
        grads={name: torch.stack([out.grads[name] for out in outputs]).mean(0) for name in outputs[0].grads},
        buffers=outputs[-1].buffers,
        loss=torch.stack([out.loss for out in outputs]).mean(),
        adversarial_loss=torch.stack([out.adversarial_loss for out in outputs]).mean(),
        output=concatenate_trees([out.output for out in outputs]),
        stats=stack_trees([out.stats for out in outputs]),
        stat_grads=stack_trees([out.stat_grads for out in outputs]),
        perturbation=stack_trees([out.perturbation for out in outputs]),
        all_finite=torch.stack([out.all_finite for out in outputs]).all(),
    )


def _adversarial_samples(samples: int, ratio: float, groups: int, remainder: str) -> int:
    """N: how many of the M samples go through the adversarial pass."""
    chosen = int(ratio * samples)
    if remainder == "drop" and groups > 1:
        chosen -= chosen % groups
    if chosen < 1:
        raise BatchError(
            f"ratio={ratio} and groups={groups} leave no sample of a batch of {samples} for the adversarial pass. "
            "Use a larger batch or ratio, or fewer groups."
        )
    number_of_groups(groups, chosen)
    return chosen


def _check_settings(ratio: float, remainder: str) -> None:
    if not 0 < ratio <= 1:
        raise SettingError(f"ratio={ratio}; expected 0 < ratio ≤ 1, the share of samples in the adversarial pass.")
    if remainder not in ("error", "drop"):
        raise SettingError(f"remainder={remainder!r}; expected 'error' or 'drop'.")


def check_microbatches(microbatches: int) -> None:
    """Make sure that a number of micro-batches is one.

    Raises:
        SettingError: it is none.
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise SettingError(f"microbatches={microbatches}; expected a positive number of parts.")
