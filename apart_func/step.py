"""The method: a proxy pass, a perturbation, an adversarial pass, and the weighted sum of both gradients.

    proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch)                        # ∇L_p, and g = ∂L_p/∂δ
    δ     = sign_perturbation(proxy.stats, proxy.stat_grads, epsilon)                  # ε · sign(g)
    θ'    = climb(params, proxy.grads, rho)                                            # θ; with ρ > 0, APART-SAM
    adver = adversarial_pass(fmodel, loss_fn, θ', buffers, first N samples, δ)         # ∇L_a at δ
    grads = r ∇L_p + (1 − r) ∇L_a                                                      # r = M / (M + N)

`make_apart_step` makes a function of these lines; everything it does can be done by hand with these parts.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from apart_func._torch import Constants, is_traced, lerp_all
from apart_func.distributed import (
    Agreement,
    described_batch,
    described_state,
    described_values,
    mean_gradients,
    mean_over_ranks,
    of_first_rank,
    output_over_ranks,
    over_ranks,
    ranks_of,
)
from apart_func.errors import BatchError
from apart_func.functional import FunctionalModel, LossFunction, as_functional, check_loss_function
from apart_func.layer.formula import statistics_dtype
from apart_func.layer.rows import Rows, number_of_groups
from apart_func.passes import (
    Precision,
    adversarial_pass,
    check_layers,
    gradients_at,
    proxy_pass,
    statistics_like,
    zero_shifts,
)
from apart_func.rules import Rule, check_epsilon, may_draw, perturbation_by, radius_limit, sign_perturbation
from apart_func.settings import Settings, check_radius, scalar
from apart_func.trees import (
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    StepOutput,
    Tensors,
    all_finite,
    batch_size,
    check_by_name,
    concatenated,
    constant,
    cut_batch,
    map_tensors,
    replaced,
    stack_by_layer,
    vectors,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tree = TypeVar("Tree")


def make_apart_step(
    model: nn.Module | FunctionalModel,
    loss_fn: LossFunction,
    *,
    epsilon: float | Tensor = 0.1,
    groups: int = 0,
    ratio: float = 1.0,
    rho: float = 0.0,
    remainder: Literal["error", "drop"] = "error",
    microbatches: int = 1,
    rule: Rule = sign_perturbation,
    rows: Rows | None = None,
    autocast_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | Literal["world", "local"] | None = None,
) -> ApartStep:
    """Make the training step of APART, or of APART-SAM: a pure function of parameters, buffers and batch.

    Args:
        model: a module with BN layers in training mode, or what `functionalize` made of it.
        loss_fn: `(output, target) -> scalar`, a mean over samples if r is to weigh both passes as the method says.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs.
        groups: ghost groups G of the adversarial pass: 0 and 1 one group, -1 a group for every sample.
        ratio: N = int(ratio · M) of the M samples go through the adversarial pass, the first ones.
        rho: radius ρ ≥ 0 of the weight perturbation, in the norm over all of `params` together: the adversarial pass is
            taken at θ + ρ ∇L_p/‖∇L_p‖ (APART-SAM).
        remainder: what to do where G does not divide N: "error", or "drop" to lower N to a multiple of G.
        microbatches: k parts of the batch, one after another; each runs both passes with its own N and δ.
        rule: makes the perturbation from statistics and their gradients. `multi_step(k)` runs k − 1 passes more.
        rows: how rows belong to samples in layers that see others than one a sample: "consecutive" (those of a sample
            follow one another), "in_turn" (one of every sample, and again), or `(layer, input) -> sample of every row`.
        autocast_dtype: dtype of an autocast region around each forward; None opens none.
        process_group: ranks to take the step together with, each with its part of the batch; "world" is all of them.
            Statistics and their gradients are averaged before the rule; gradients, losses and floating buffers at the
            end, both passes together (with ρ > 0 those of the proxy pass before the ascent as well). Ranks weigh alike,
            however many samples they have, and N and r are those of each. None and "local" reduce nothing.

    Returns:
        `apart_step(params, buffers, batch, *, epsilon=None, loss_scale=None) -> StepOutput`.

    Raises:
        ApartError: a setting is out of range, or the model has no batch norm to perturb.
    """
    settings = Settings(
        epsilon=epsilon,
        groups=groups,
        ratio=ratio,
        rho=rho,
        remainder=remainder,
        microbatches=microbatches,
        rule=rule,
        rows=rows,
        autocast_dtype=autocast_dtype,
        process_group=process_group,
    )
    return ApartStep(as_functional(model), loss_fn, settings)


def make_apart_sam_step(
    model: nn.Module | FunctionalModel, loss_fn: LossFunction, *, rho: float = 0.05, **settings: Any
) -> ApartStep:
    """`make_apart_step` with a weight perturbation by default: the step of APART-SAM."""
    return make_apart_step(model, loss_fn, rho=rho, **settings)


class Step:
    """What the steps have in common: a functional model, a loss, and settings. A value: it can be copied and pickled.

    Attributes:
        fmodel: the model as a function.
        loss_fn: `(output, target) -> scalar`.
    """

    def __init__(self, fmodel: FunctionalModel, loss_fn: LossFunction, settings: Settings) -> None:
        check_loss_function(loss_fn)
        self.fmodel, self.loss_fn = fmodel, loss_fn
        self._constants = Constants(settings=settings)
        self._agreement = Agreement()

    @property
    def settings(self) -> Settings:
        """What the step does."""
        return self._constants.settings  # type: ignore[return-value]  # attributes of a module have no types of their own

    def __repr__(self) -> str:
        loss = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        return f"{type(self).__name__}({self.fmodel!r}, {loss}, {self.settings})"

    def _ranks(
        self, params: Tensors, buffers: Tensors, batch: Any, perturbation: PerturbationTree
    ) -> ProcessGroup | None:
        """The ranks to reduce over, after a look at whether they take the same step, the first time."""
        group = ranks_of(self.settings.process_group)

        def described() -> dict[str, str]:
            tensors = self.fmodel.check_state(params, buffers)
            return {
                "the settings": f"{type(self).__name__}: {self.settings.described()}",
                "the names, shapes and dtypes of params": described_state(params),
                "the names, shapes and dtypes of buffers": described_state(buffers),
                "the batch-norm layers": repr(list(self.fmodel.layers)),
                "the values of params and buffers": described_values(tensors.values()),
                "the values of the perturbation": described_values(vectors(perturbation)),
                "the tensors of the batch": described_batch(batch),
            }

        self._agreement.reach(group, described)
        return group

    def _over_ranks(self, buffers: Tensors, group: ProcessGroup | None) -> Callable[[StepOutput], StepOutput]:
        """How to make the output of all ranks of that of this one, in a step that begins with some buffers."""
        return lambda out: out if group is None else output_over_ranks(out, buffers, self.fmodel.moving, group)

    def _call_settings(
        self, params: Tensors, buffers: Tensors, epsilon: Any, loss_scale: Any
    ) -> tuple[Tensor, Precision, Tensor]:
        """Radius and precision of one call, and whether the radius is one where its value cannot be read."""
        rule, dtype = self.settings.rule, self.settings.autocast_dtype
        like = statistics_like(self.fmodel.check_state(params, buffers))
        if epsilon is None:
            epsilon = self.settings.epsilon
        else:
            check_epsilon(epsilon, rule)
        radius = scalar(epsilon, "epsilon", like.dtype, like.device)
        scale = None if loss_scale is None else scalar(loss_scale, "loss_scale", torch.float32, like.device)
        return radius, Precision(dtype, scale), (radius >= 0) & (radius < radius_limit(rule))


class ApartStep(Step):
    """One training step of APART as a function of parameters, buffers and a batch; `make_apart_step` makes it.

        out = apart_step(params, buffers, batch)             # a StepOutput: out.grads, out.buffers, out.loss, ...

    It holds a copy of the model without its tensors, the loss, and `settings`; no call changes it, or its arguments. It
    can be copied, pickled, compiled by `torch.compile`, mapped by `torch.func.vmap`, and called from several threads.
    """

    def __call__(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: tuple[Any, Any],
        *,
        epsilon: float | Tensor | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> StepOutput:
        """Take one step; nothing that goes in is changed.

        Args:
            params: trained tensors by name.
            buffers: all other tensors by name.
            batch: `(input, target)`, pytrees of M samples.
            epsilon: overrides the radius for this call; a 0-d tensor that changes does not recompile.
            loss_scale: factor on both losses during their backward, divided out of all gradients.

        Returns:
            Where `all_finite` is False, `buffers` are those that came in.

        Raises:
            ApartError: an argument does not fit the model or the settings; the message says which, and how to mend it.
        """
        radius, precision, in_range = self._call_settings(params, buffers, epsilon, loss_scale)
        group = self._ranks(params, buffers, batch, {})

        def one_batch(moved: Tensors, part: Any) -> StepOutput:
            out = self._one_batch(params, moved, part, radius, precision, group)
            return replaced(out, all_finite=out.all_finite & in_range)

        return over_microbatches(
            one_batch, buffers, batch, self.settings.microbatches, self._over_ranks(buffers, group)
        )

    def _one_batch(
        self,
        params: Tensors,
        buffers: Tensors,
        batch: Any,
        radius: Tensor,
        precision: Precision,
        group: ProcessGroup | None,
    ) -> StepOutput:
        fmodel, loss_fn, settings = self.fmodel, self.loss_fn, self.settings
        samples = batch_size(batch)
        chosen = adversarial_samples(samples, settings)
        proxy = proxy_pass(fmodel, loss_fn, params, buffers, batch, precision=precision)
        zero = zero_shifts(fmodel.layers, radius)

        def further(perturbation: PerturbationTree) -> StatGradTree:
            where = {**zero, **perturbation}
            found = gradients_at(fmodel, loss_fn, params, buffers, batch, where, precision=precision)
            found = found if group is None else mean_over_ranks(found, group)
            return {layer: found[layer] for layer in perturbation}

        stat_grads, perturbation = found_perturbation(
            zero,
            proxy.stats,
            proxy.stat_grads,
            lambda stats, grads: perturbation_by(settings.rule, stats, grads, radius, further),
            group,
            may_draw(settings.rule),
        )
        start = params
        if settings.rho:
            start = climb(params, proxy.grads if group is None else mean_gradients(proxy.grads, group), settings.rho)
        adversarial = adversarial_pass(
            fmodel,
            loss_fn,
            start,
            proxy.buffers,
            cut_batch(batch, 0, chosen),
            perturbation,
            groups=settings.groups,
            rows=settings.rows,
            precision=precision,
        )
        grads = _interpolate(proxy.grads, adversarial.grads, chosen / (samples + chosen))
        # A gradient of either pass that is not finite leaves its mark on their sum.
        values = [proxy.loss, adversarial.loss, *grads.values(), *vectors(stat_grads), *vectors(perturbation)]
        return StepOutput(
            grads=grads,
            buffers=proxy.buffers,
            loss=proxy.loss,
            adversarial_loss=adversarial.loss,
            output=proxy.output,
            stats=proxy.stats,
            stat_grads=stat_grads,
            perturbation=perturbation,
            all_finite=all_finite(values),
        )


def found_perturbation(
    before: PerturbationTree,
    stats: StatTree,
    stat_grads: StatGradTree,
    rule: Callable[[StatTree, StatGradTree], PerturbationTree],
    group: ProcessGroup | None,
    draws: bool,
) -> tuple[StatGradTree, PerturbationTree]:
    """What a rule makes of the layers that were called; the others keep the perturbation that they had.

    Args:
        before: the perturbation that they had.
        stats: batch statistics of the layers that were called on this rank.
        stat_grads: their gradients, with leading dimensions where there were micro-batches.
        rule: of statistics and their gradients, `(C,)`.
        group: the ranks that find one perturbation together.
        draws: whether the rule may draw at random, so that the first rank's result has to be everybody's.

    Returns:
        The statistic gradients, averaged over ranks, and the perturbation.
    """
    if group is not None:
        together = over_ranks(stats, stat_grads, group)
        found = rule(together.stats, _of_batch(together.stat_grads))
        check_layers(together.stat_grads, found)
        if draws:
            found = of_first_rank(found, group)
        return together.stat_grads, constant(together.where_called(found, before))
    called = {layer: stat_grads[layer] for layer in stat_grads if layer in stats}
    if not called:
        return stat_grads, before
    found = rule(stats, _of_batch(called))
    check_layers(called, found)
    return stat_grads, {**before, **constant(found)}


def _of_batch(stat_grads: StatGradTree) -> StatGradTree:
    """Statistic gradients of a batch, the mean over its micro-batches."""
    if all(g.mean.dim() == 1 for g in stat_grads.values()):
        return stat_grads
    return {layer: StatGrads(mean.mean(0), scale.mean(0)) for layer, (mean, scale) in stat_grads.items()}


def over_microbatches(
    one_batch: Callable[[Tensors, Any], StepOutput],
    buffers: Tensors,
    batch: Any,
    microbatches: int,
    reduce: Callable[[StepOutput], StepOutput],
) -> StepOutput:
    """Run a step on the parts of a batch, one after another.

    Args:
        one_batch: the step, from buffers and a part; the buffers it returns go to the next part.
        buffers: for the first part.
        batch: `(input, target)`, of which every part gets an equal share.
        microbatches: number of parts.
        reduce: makes the output of all ranks of that of this one.

    Returns:
        One output for all of them. Where something is not finite, its buffers are those that came in.

    Raises:
        BatchError: the batch cannot be cut into so many parts.
    """
    outputs, moved = [], buffers
    for part in _parts(batch, microbatches):
        outputs.append(one_batch(moved, part))
        moved = outputs[-1].buffers
    out = reduce(outputs[0] if microbatches == 1 else _mean_output(outputs))
    return replaced(out, buffers=chosen(out.all_finite, out.buffers, dict(buffers)))


def climb(params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> Tensors:
    """θ + ρ g/‖g‖, SAM's ascent, with the norm over all tensors together; θ where the gradient is zero.

    Args:
        params: θ by name.
        grads: g, likewise.
        rho: radius ρ ≥ 0.

    Example:
        >>> climb({"weight": torch.zeros(2)}, {"weight": torch.tensor([3.0, 4.0])}, rho=0.5)["weight"]
        tensor([0.3000, 0.4000])
    """
    check_by_name("params", params)
    check_by_name("grads", grads)
    check_radius("rho", rho)
    norm = global_norm(grads)
    length = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return {name: param + length.to(param.real.dtype) * grads[name] for name, param in params.items()}


def global_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, 0-d, in at least float32."""
    squares = [tensor.to(statistics_dtype(tensor.dtype)).abs().square().sum() for tensor in tensors.values()]
    return torch.sqrt(sum(squares, torch.zeros_like(squares[0])))


def _interpolate(start: Tensors, end: Tensors, weight: float) -> Tensors:
    """(1 − weight) · start + weight · end."""
    if is_traced():  # foreach kernels know no vmap, and compilers fuse without them
        return {name: torch.lerp(grad, end[name], weight) for name, grad in start.items()}
    ends = [end[name] for name in start]
    return dict(zip(start, lerp_all(list(start.values()), ends, weight), strict=True))


def chosen(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` where the condition holds, else `old`, leaf by leaf; the host waits for no device."""
    if condition.device.type == "cpu" and not is_traced():
        return new if condition else old

    def of_leaf(one: Tensor, other: Tensor) -> Tensor:
        return one if one is other else torch.where(condition, one, other)

    tree: Tree = map_tensors(of_leaf, new, old)
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
        output=concatenated([out.output for out in outputs]),
        stats=stack_by_layer([out.stats for out in outputs]),
        stat_grads=stack_by_layer([out.stat_grads for out in outputs]),
        perturbation=stack_by_layer([out.perturbation for out in outputs]),
        all_finite=torch.stack([out.all_finite for out in outputs]).all(),
    )


def adversarial_samples(samples: int, settings: Settings) -> int:
    """N: how many of the M samples go through the adversarial pass.

    Raises:
        BatchError: none would, or the ghost groups do not divide them.
    """
    ratio, groups = settings.ratio, settings.groups
    chosen = int(ratio * samples)
    if settings.remainder == "drop" and groups > 1:
        chosen -= chosen % groups
    if chosen < 1:
        raise BatchError(
            f"ratio={ratio} and groups={groups} leave no sample of a batch of {samples} for the adversarial pass. "
            "Use a larger batch or ratio, or fewer groups."
        )
    number_of_groups(groups, chosen)
    return chosen
