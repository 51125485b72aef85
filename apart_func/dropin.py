"""APART for a loop built on `loss.backward()`: a context around each pass.

Inside a context (`contexts.py`) the model's BN layers are normalised as in the functional passes. Outside, the model is
as the user made it.
"""

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
from apart_func.contexts import Context, are_zero, lent_state, versions
from apart_func.errors import SettingError, UsageError
from apart_func.functional import counted_layers
from apart_func.groups import Rows
from apart_func.intercept import Interception, batch_norm_layers, check_unmixed, no_training_layer, perturbable_layers
from apart_func.one_pass import draw_perturbation
from apart_func.ranks import ConsistencyCheck, Ranks, check_groups, described_state, group_of_module
from apart_func.rules import IterativeRule, Rule, kind_of, random_sign_perturbation, sign_perturbation
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
    accumulate gradients, take each micro-batch through both contexts in turn. Running statistics move at each call of a
    layer, as in plain training.

    Args:
        model: any module with BN layers. Those in training mode when they are called are perturbed. A compiled model is
            one graph for each pass; compile it with `dynamic=False` if the adversarial pass gets fewer samples.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs. Random signs
            want about twice the radius of those of the gradient: try 0.1 to 0.4.
        groups: ghost groups of the adversarial pass; sample i is in group i mod `groups`. 0 and 1 make one group of the
            whole batch, -1 a group of every sample. `one_pass()` needs two or more.
        rule: makes the perturbation from statistics and the gradients of the loss, as it was scaled for `backward()`.
            None is `sign_perturbation`, and in `one_pass()` random signs.
        rows: how rows belong to samples in layers that see others than one a sample, as in `make_apart_step`.
        process_group: ranks to average statistics and their gradients over; those of parameters are the wrapper's.
            "world" is all ranks, "local" this one alone. None takes those of the `DistributedDataParallel` that `model`
            is or holds; without one all ranks there are, with a warning.

    Attributes:
        stats: this rank's batch statistics of the last proxy pass, or of the clean samples of the last `one_pass()`.
        stat_grads: their gradients, averaged over ranks; there once a perturbation is made from them.
        perturbation: δ of the last adversarial pass, or of the last `one_pass()`.

    Raises:
        ApartError: a setting is out of range; entering a context also if the model has no BN layer, or if the order of
            contexts and `backward()` is wrong.
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
        if isinstance(rule, IterativeRule):
            raise rule.refusal()
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
        layers, _, radius, zero = self._enter("to_proxy()")
        self._proxy, self.stats, self.stat_grads, self.perturbation = None, {}, {}, {}
        for leaf in leaves(zero):
            leaf.requires_grad_()
        context = Context("to_proxy()", self.model, layers, zero, 1, self.rows, 1.0, radius.dtype)
        with self._opened(context):
            yield self
        self._proxy, self.stats = context, context.record.clean_stats()

    @contextmanager
    def to_adver(self) -> Iterator[APART]:
        """Make the passes inside adversarial: ghost groups at δ, while no buffer or frozen parameter moves."""
        layers, ranks, radius, zero = self._enter("to_adver()")
        check_groups(self.groups, layers.values())
        stat_grads, rule = self._stat_grads(layers), self._rule(sign_perturbation)
        draws = kind_of(rule).draws
        training = {name: shift for name, shift in zero.items() if layers[name].training}
        stat_grads = {name: stat_grads[name] for name in layers if name in training or name in self.stats}
        self.stat_grads, self.perturbation = find_perturbation(
            training, self.stats, stat_grads, lambda stats, grads: rule(stats, grads, radius), ranks, draws=draws
        )
        point = zero | self.perturbation
        check_perturbation(_channels(layers), point, max(self.groups, 1))
        context = Context("to_adver()", self.model, layers, point, self.groups, self.rows, 0.0, radius.dtype)
        with lent_state(self.model), self._opened(context):
            yield self
        self._proxy = None

    @contextmanager
    def one_pass(self, clean_fraction: float = 0.5) -> Iterator[APART]:
        """Make the passes inside clean for some ghost groups, and adversarial for the others.

        Every context draws its random signs. Running statistics move by the clean samples.

        Args:
            clean_fraction: share of the groups that are clean, rounded to whole groups: at least one, less than all.
        """
        self._settings(clean_fraction)
        rule = self._rule(random_sign_perturbation)
        if kind_of(rule).needs_gradients:
            raise SettingError(
                "one_pass() draws its perturbation, and the rule wants gradients of the step before. Leave rule=None, "
                "or take make_one_pass_step, where a perturbation is a value that goes in and comes out."
            )
        if self.groups in (0, 1):
            problem = f"one_pass() needs groups of both kinds, and groups={self.groups} makes one of the whole batch"
            raise SettingError(f"{problem}. Say APART(model, epsilon, groups=4), with groups of 16 to 32 samples.")
        if self.groups > 0:
            clean_groups(clean_fraction, self.groups)
        layers, ranks, radius, zero = self._enter("one_pass()")
        check_groups(self.groups, layers.values())
        check_unmixed(self.model)
        # Layers in evaluation mode get one as well, for the case that they are put in training mode inside.
        parts = [{name: z for name, z in zero.items() if layers[name].training is mode} for mode in (True, False)]
        drawn = [draw_perturbation(rule, part, radius, ranks) for part in parts if part]
        point = drawn[0] | drawn[-1]
        check_perturbation(_channels(layers), point, 1)
        self.perturbation, self._proxy, self.stat_grads = drawn[0], None, {}
        context = Context("one_pass()", self.model, layers, point, self.groups, self.rows, clean_fraction, radius.dtype)
        with self._opened(context):
            yield self
        self.stats = context.record.clean_stats()

    def _rule(self, default: Rule) -> Rule:
        """Return the user's rule, or that of the context."""
        return default if self.rule is None else self.rule

    def _settings(self, clean_fraction: float = 0.5) -> Settings:
        """Check the settings, which may have been set as attributes since."""
        values = {name: getattr(self, name) for name in ("epsilon", "groups", "rows", "process_group")}
        return Settings(rule=self._rule(sign_perturbation), clean_fraction=clean_fraction, **values)

    def _enter(self, context: str) -> tuple[dict[str, Any], Ranks, Tensor, PerturbationTree]:
        """Return layers, ranks, radius and no perturbation for a context, after a look at what surrounds it."""
        if self._inside:
            raise UsageError(f"{context} was entered inside {self._inside}. Leave one context before the next begins.")
        if torch.is_inference_mode_enabled():
            raise UsageError(f"{context} was entered in inference_mode, where no gradient exists. Leave that mode.")
        self._settings()
        group, is_guessed = group_of_module(self.process_group, self.model)
        if is_guessed and not self._check.is_done:
            warnings.warn(
                "APART found no DistributedDataParallel in the model, and averages statistic gradients over all "
                f"{dist.get_world_size()} ranks. Say process_group='world' if that is meant, or else 'local'.",
                stacklevel=4,
            )
        ranks = Ranks(group)
        ranks.check(self._check, self._described)
        layers = perturbable_layers(self.model)
        # A model that is in evaluation mode as a whole may be put in training mode inside, as trainers do.
        is_training = any(module.training for module in self.model.modules() if not list(module.children()))
        if is_training and not any(layer.training for layer in layers.values()):
            raise no_training_layer(type(self.model).__name__, len(layers))
        torch.clear_autocast_cache()  # what it has cast may have moved since, as by SAM's ascent
        kind = statistics_kind(dict(self.model.named_parameters()) or dict(named_tensors(self.model)))
        return layers, ranks, scalar(self.epsilon, "epsilon", *kind), zero_perturbation(_channels(layers), *kind)

    def _described(self) -> dict[str, str]:
        """Describe what ranks have to have in common."""
        default = ", the rules of the contexts" if self.rule is None else ""
        return {
            "the settings": f"{type(self).__name__}: {self._settings().described()}{default}",
            "the names, shapes and dtypes of the model's tensors": described_state(dict(named_tensors(self.model))),
            "the batch-norm layers": repr(_channels(batch_norm_layers(self.model))),
        }

    @contextmanager
    def _opened(self, context: Context) -> Iterator[None]:
        """Lead the layers to the handler of a context while open."""
        # Reuse the interception while the layers are the same: torch.compile guards on its identity.
        if self._interception is None or self._interception.layers != context.layers:
            self._interception = Interception(context.layers)
        self._inside = context.name
        try:
            with self._interception.installed(context), context.hooked():
                yield
        finally:
            self._inside = None
        context.check_end()

    def _stat_grads(self, layers: Mapping[str, Any]) -> StatGradTree:
        """Return the gradients that backward() left of a proxy pass; zero for layers that it did not reach."""
        proxy = self._proxy
        if proxy is None:
            raise UsageError(
                "to_adver() was entered with no proxy pass since the last adversarial one, and its perturbation comes "
                "from there. Run the model, and backward(), under `with apart.to_proxy():` first."
            )
        replaced = sorted(name for name in {*layers, *proxy.layers} if layers.get(name) is not proxy.layers.get(name))
        moved = [name for name, layer in layers.items() if layer.training != proxy.modes.get(name)]
        if replaced or moved:
            kind = "BN layers" if replaced else "BN layers in training mode"
            changed = f"{replaced} came, went, or were replaced" if replaced else f"{moved} came or went"
            advice = "Leave the model's structure and modes alone between to_proxy() and to_adver()"
            raise UsageError(f"the {kind} are not those of the proxy pass: {changed}. {advice}.")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grads, has_gradients = [p.grad for p in trained if p.grad is not None], proxy.has_gradients()
        is_cleared = not grads or (are_zero(grads) and not are_zero(leaves(proxy.stat_grads())))
        if has_gradients and trained and is_cleared:
            problem = "the proxy pass's gradients are gone: zero_grad() was called between to_proxy() and to_adver()"
            raise UsageError(f"{problem}, whose gradients add up. Call it once a step, before to_proxy().")
        if not has_gradients and not proxy.skipped_all():
            if is_cleared or proxy.versions == versions(self.model):
                raise UsageError(
                    "to_adver() was entered with no backward() since the proxy pass, so there are no statistic "
                    "gradients. Call backward() on the loss of the pass under to_proxy(), in the context or after it."
                )
            if proxy.has_graph:  # not frozen features without one
                warnings.warn(
                    "the proxy pass left no statistic gradients, so the adversarial pass has no perturbation: "
                    "torch.autograd.grad and backward(inputs=...) leave none. Call loss.backward().",
                    stacklevel=4,
                )
        return proxy.stat_grads()


def _channels(layers: Mapping[str, Any]) -> dict[str, int]:
    """Return the channels of layers, by name."""
    return {name: layer.num_features for name, layer in layers.items()}
