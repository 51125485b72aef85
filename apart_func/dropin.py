"""APART for a loop built on `loss.backward()`: a context around each pass; outside, the model is as it was made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apart_func.calls import find_perturbation
from apart_func.checks import check_epsilon, check_perturbation, clean_groups, scalar
from apart_func.contexts import Context, are_zero, gradient_versions, lent_state
from apart_func.errors import SettingError, UsageError
from apart_func.functional import counted_layers
from apart_func.groups import Rows
from apart_func.intercept import Interception, batch_norm_layers, check_unmixed, no_training_layer, perturbable_layers
from apart_func.one_pass import draw_perturbation
from apart_func.ranks import ConsistencyCheck, Ranks, check_groups, data_parallel_group, described_state, group_of
from apart_func.rules import Rule, kind_of, random_sign_perturbation, sign_perturbation
from apart_func.settings import Settings
from apart_func.snapshot import check_model, named_tensors
from apart_func.trees import PerturbationTree, StatGradTree, StatTree, leaves, statistics_kind, zero_perturbation


class APART:
    """Run the passes of the method in a loop of your own: each context makes what runs inside it one of the passes.

        apart = APART(model, epsilon=0.2, groups=4)
        with apart.one_pass():                                  # half of the ghost groups at random signs of radius ε
            criterion(model(x), y).backward()

    or, in the two passes of the original method,

        with apart.to_proxy():                                  # plain training, and ∂L_p/∂δ on the way
            (r * criterion(model(x), y)).backward()             # r = M / (M + N)
        with apart.to_adver():                                  # δ = ε · sign(∂L_p/∂δ), statistics pushed by δ
            ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

    Call `backward()` inside a context or after it; with activation checkpointing (`use_reentrant=False`), inside. To
    accumulate gradients, take each micro-batch through both contexts in turn.

    Args:
        model: any module with BN layers; those that are called in training mode are perturbed. A compiled model is one
            graph for each pass; compile it with `dynamic=False` if the adversarial pass gets fewer samples.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs. Random signs
            want about twice the radius of those of the gradient: try 0.1 to 0.4.
        groups: ghost groups of the adversarial pass; sample i is in group i mod `groups`. 0 and 1 make one group of the
            whole batch, -1 a group of every sample. `one_pass()` needs two or more.
        rule: makes the perturbation from statistics and the gradients of the loss, as it was scaled for `backward()`.
            None is `sign_perturbation`, and in `one_pass()` random signs.
        rows: how rows belong to samples in layers that see others than one a sample, as in `make_apart_step`.
        process_group: ranks to average statistic gradients over: "world", "local" for this one alone, or a group. None
            is that of the `DistributedDataParallel` that `model` is or holds; without one "world", with a warning.

    Attributes:
        stats: this rank's batch statistics of the last proxy pass, or of the clean samples of the last `one_pass()`.
        stat_grads: their gradients, averaged over ranks; there once a perturbation is made from them.
        perturbation: δ of the last adversarial pass, or of the last `one_pass()`.

    Raises:
        ApartError: a setting is out of range; in a context also if the model has no BN layer, or the order is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float | Tensor = 0.1,
        groups: int = 0,
        *,
        rule: Rule | None = None,
        rows: Rows | None = None,
        process_group: dist.ProcessGroup | Literal["world", "local"] | None = None,
    ) -> None:
        check_model(model)
        self.model, self.epsilon, self.groups, self.rule = model, epsilon, groups, rule
        self.rows, self.process_group = rows, process_group
        self._settings()
        self.stats: StatTree = {}
        self.stat_grads: StatGradTree = {}
        self.perturbation: PerturbationTree = {}
        self._proxy: Context | None = None  # until an adversarial pass has used it
        self._inside: str | None = None  # the context that is open
        self._check = ConsistencyCheck()
        self._interception: Interception | None = None

    def __repr__(self) -> str:
        layers = counted_layers(len(batch_norm_layers(self.model)))
        return f"APART({type(self.model).__name__}, {layers}, {self._settings()})"

    def __getstate__(self) -> dict[str, Any]:
        if self._inside:
            raise UsageError(f"APART is copied inside {self._inside}. Leave the context first.")
        return {**vars(self), "_interception": None, "_proxy": None}  # a copy has layers of its own

    def to(self, *args: Any, **kwargs: Any) -> APART:
        """Move the model, as `model.to`, and return this object."""
        self.model.to(*args, **kwargs)
        return self

    def cuda(self, device: Any = None) -> APART:
        """Move the model to a GPU, and return this object."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> APART:
        """Move the model to the CPU, and return this object."""
        return self.to("cpu")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters, for an optimizer."""
        return self.model.parameters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters."""
        self.model.zero_grad(set_to_none)

    def set_epsilon(self, epsilon: float | Tensor) -> APART:
        """Change the radius, a number or 0-d tensor as in `APART`, from the next pass on, and return this object."""
        check_epsilon(epsilon, kind_of(self._rule(sign_perturbation)).is_bounded)
        self.epsilon = epsilon
        return self

    @contextmanager
    def to_proxy(self) -> Iterator[APART]:
        """Make the passes inside proxy passes: plain training, which also yields the statistic gradients."""
        if self._proxy is not None and self._proxy.has_gradients():
            warnings.warn(
                "to_proxy() was entered again with no to_adver() in between: the statistic gradients of the proxy pass "
                "before are dropped. Compute all losses of a step inside one to_proxy().",
                stacklevel=3,
            )
        context, _, _ = self._enter("to_proxy()", 1, 1.0)
        self._proxy, self.stats, self.stat_grads, self.perturbation = None, {}, {}, {}
        for leaf in leaves(context.point):
            leaf.requires_grad_()
        with self._opened(context):
            yield self
        self._proxy, self.stats = context, context.record.clean_stats()

    @contextmanager
    def to_adver(self) -> Iterator[APART]:
        """Make the passes inside adversarial: ghost groups at δ, while no buffer or frozen parameter moves."""
        context, ranks, radius = self._enter("to_adver()", self.groups, 0.0)
        rule, stat_grads = self._rule(sign_perturbation), self._stat_grads(context.layers)
        before = {name: context.point[name] for name in stat_grads}
        self.stat_grads, self.perturbation = find_perturbation(rule, before, self.stats, stat_grads, radius, ranks)
        context.point |= self.perturbation
        check_perturbation(_channels(context.layers), context.point, max(self.groups, 1))
        with lent_state(self.model), self._opened(context):
            yield self
        self._proxy = None

    @contextmanager
    def one_pass(self, clean_fraction: float = 0.5) -> Iterator[APART]:
        """Make some ghost groups of the passes inside clean, by which running statistics move, the others adversarial.

        Args:
            clean_fraction: share of the groups that are clean, rounded to whole groups: at least one, less than all.
        """
        context, ranks, radius = self._enter("one_pass()", self.groups, clean_fraction)
        layers, rule = context.layers, self._rule(random_sign_perturbation)
        if kind_of(rule).needs_gradients:
            problem = "one_pass() draws its perturbation, and the rule wants gradients of the step before"
            raise SettingError(f"{problem}. Leave rule=None, or take make_one_pass_step, where δ goes in and out.")
        if self.groups in (0, 1):
            problem = f"one_pass() needs groups of both kinds, and groups={self.groups} makes one of the whole batch"
            raise SettingError(f"{problem}. Say APART(model, epsilon, groups=4), with groups of 16 to 32 samples.")
        if self.groups > 0:
            clean_groups(clean_fraction, self.groups)
        check_unmixed(self.model)
        # Layers in evaluation mode get signs as well: they may be put in training mode inside.
        zero = context.point.items()
        parts = [{name: z for name, z in zero if layers[name].training is mode} for mode in (True, False)]
        drawn = [draw_perturbation(rule, part, radius, ranks) for part in parts if part]
        context.point = drawn[0] | drawn[-1]
        check_perturbation(_channels(layers), context.point, 1)
        self.perturbation, self._proxy, self.stat_grads = drawn[0], None, {}
        with self._opened(context):
            yield self
        self.stats = context.record.clean_stats()

    def _rule(self, default: Rule) -> Rule:
        return default if self.rule is None else self.rule

    def _settings(self, clean_fraction: float = 0.5) -> Settings:
        """Check the settings, which may have been set as attributes since."""
        values = {name: getattr(self, name) for name in ("epsilon", "groups", "rows", "process_group")}
        return Settings(rule=self._rule(sign_perturbation), clean_fraction=clean_fraction, **values)

    def _enter(self, name: str, groups: int, clean: float) -> tuple[Context, Ranks, Tensor]:
        """Return a context at no perturbation, the ranks and the radius, after a look at what surrounds it."""
        if self._inside:
            raise UsageError(f"{name} was entered inside {self._inside}. Leave one context before the next begins.")
        if torch.is_inference_mode_enabled():
            raise UsageError(f"{name} was entered in inference_mode, where no gradient exists. Leave that mode.")
        settings = self._settings(clean)
        group: Any = self.process_group
        if group is None and dist.is_available() and dist.is_initialized():
            group = data_parallel_group(self.model) or "world"
        ranks = Ranks(group_of(group))
        is_guess = self.process_group is None and group == "world" and dist.get_world_size() > 1
        if is_guess and not self._check.is_done:
            warnings.warn(
                "APART found no DistributedDataParallel in the model, and averages statistic gradients over all "
                f"{dist.get_world_size()} ranks. Say process_group='world' if that is meant, or else 'local'.",
                stacklevel=4,
            )
        ranks.check(
            self._check,
            lambda: {
                "the settings": f"APART: {settings.described()}, rule given: {self.rule is not None}",
                "the names, shapes and dtypes of the model's tensors": described_state(dict(named_tensors(self.model))),
                "the batch-norm layers": repr(_channels(batch_norm_layers(self.model))),
            },
        )
        layers = perturbable_layers(self.model)
        # A model that is in evaluation mode as a whole may be put in training mode inside, as trainers do.
        is_training = any(module.training for module in self.model.modules() if not list(module.children()))
        if is_training and not any(layer.training for layer in layers.values()):
            raise no_training_layer(type(self.model).__name__, len(layers))
        check_groups(groups, layers.values())
        torch.clear_autocast_cache()  # what it has cast may have moved since, as by SAM's ascent
        kind = statistics_kind(dict(self.model.named_parameters()) or dict(named_tensors(self.model)))
        zero = zero_perturbation(_channels(layers), *kind)
        context = Context(name, self.model, layers, zero, groups, self.rows, clean)
        return context, ranks, scalar(self.epsilon, "epsilon", *kind)

    @contextmanager
    def _opened(self, context: Context) -> Iterator[None]:
        # Reuse the interception while the layers are the same: torch.compile guards on its identity.
        if self._interception is None or self._interception.layers != context.layers:
            self._interception = Interception(context.layers)
        self._inside = context.name
        try:
            with self._interception.installed(context), context.watching():
                yield
        finally:
            self._inside = None

    def _stat_grads(self, layers: Mapping[str, Any]) -> StatGradTree:
        """Return the gradients that backward() left of the proxy pass, if what came between allows it."""
        proxy = self._proxy
        if proxy is None:
            problem = "to_adver() takes δ from a proxy pass, and there was no proxy pass since the last adversarial one"
            raise UsageError(f"{problem}. Run the model, and backward(), under `with apart.to_proxy():` first.")
        replaced = sorted({name for name, _ in layers.items() ^ proxy.layers.items()})
        moved = [name for name, layer in layers.items() if layer.training != proxy.modes.get(name)]
        if replaced or moved:
            kind = "BN layers" if replaced else "BN layers in training mode"
            changed = f"{replaced} came, went, or were replaced" if replaced else f"{moved} came or went"
            advice = "Leave the model's structure and modes alone between to_proxy() and to_adver()"
            raise UsageError(f"the {kind} are not those of the proxy pass: {changed}. {advice}.")
        trained = [parameter.grad for parameter in self.model.parameters() if parameter.requires_grad]
        grads, has_gradients = [grad for grad in trained if grad is not None], proxy.has_gradients()
        is_cleared = not grads or (are_zero(grads) and not are_zero(leaves(proxy.stat_grads())))
        if has_gradients and trained and is_cleared:
            problem = "the proxy pass's gradients are gone: zero_grad() was called between to_proxy() and to_adver()"
            raise UsageError(f"{problem}, whose gradients add up. Call it once a step, before to_proxy().")
        if not has_gradients and not proxy.skipped_all():
            if is_cleared or proxy.versions == gradient_versions(self.model):
                problem = "to_adver() takes δ from gradients, and there was no backward() since the proxy pass"
                raise UsageError(f"{problem}. Call backward() on the loss of to_proxy(), in the context or after it.")
            if proxy.has_graph:  # not frozen features without one
                warnings.warn(
                    "the proxy pass left no statistic gradients, so the adversarial pass has no perturbation: "
                    "torch.autograd.grad and backward(inputs=...) leave none. Call loss.backward().",
                    stacklevel=4,
                )
        found = proxy.stat_grads().items()
        return {name: grads for name, grads in found if layers[name].training or name in self.stats}


def _channels(layers: Mapping[str, Any]) -> dict[str, int]:
    """Return the channels of layers, by name."""
    return {name: layer.num_features for name, layer in layers.items()}
