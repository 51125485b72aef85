"""APART for a loop built on `loss.backward()`: a context around each pass.

    apart = APART(model, epsilon=0.2, groups=4)
    with apart.one_pass():                                       # half of the ghost groups at random signs of radius ε
        criterion(model(x), y).backward()

or the method as it was published:

    with apart.to_proxy():                                       # plain training, and ∂L_p/∂δ on the way
        (r * criterion(model(x), y)).backward()
    with apart.to_adver():                                       # δ = ε · sign(∂L_p/∂δ), statistics pushed by δ
        ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

Inside a context the model's BN layers are normalised by the handler of the functional passes (`layers.py`), through the same
interception (`intercept.py`). Outside, the model is as the user made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apart_func._torch import backward_task, is_checkpointed
from apart_func.checks import check_epsilon, check_perturbation, clean_groups, scalar
from apart_func.errors import BatchError, SettingError, UsageError
from apart_func.functional import counted_layers
from apart_func.groups import Grouping, Rows, number_of_groups
from apart_func.intercept import (
    BatchNormCall,
    Interception,
    batch_norm_layers,
    check_unmixed,
    is_stock,
    no_training_layer,
    perturbable_layers,
)
from apart_func.layers import PerturbedLayers, Record
from apart_func.one_pass import draw_perturbation
from apart_func.ranks import ConsistencyCheck, Ranks, check_groups, described_state, group_of_module, ranks_of
from apart_func.rules import IterativeRule, Rule, kind_of, random_sign_perturbation, sign_perturbation
from apart_func.running import copy_into_buffer
from apart_func.settings import Settings
from apart_func.snapshot import check_model, named_tensors
from apart_func.step import find_perturbation
from apart_func.trees import (
    Perturbation,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    leaves,
    statistics_kind,
    tensors_of,
    zero_perturbation,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class APART:
    """The drop-in form of the method: contexts around the passes of a training step.

        apart = APART(model, epsilon=0.2, groups=4)
        with apart.one_pass():
            criterion(model(x), y).backward()

    or, in two passes,

        with apart.to_proxy():
            (r * criterion(model(x), y)).backward()                            # r = M / (M + N)
        with apart.to_adver():
            ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

    `backward()` may be called inside a context or after it; with activation checkpointing (`use_reentrant=False`)
    inside. If gradients are accumulated over micro-batches, each of them goes through both contexts in turn.
    Running statistics move at each call of a layer, as in plain training.

    Args:
        model: any module with BN layers. Those that are in training mode when they are called are perturbed. A compiled
            model is one graph for each pass; compile it with `dynamic=False` if the adversarial pass gets fewer samples.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs. Random signs,
            as of `one_pass()`, want about twice the radius of those of the gradient: try 0.1 to 0.4.
        groups: ghost groups of the adversarial pass; sample i is in group i mod `groups`. 0 and 1 make one group of
            the whole batch, -1 makes a group of every sample. `one_pass()` needs two or more.
        rule: makes the perturbation from statistics and their gradients. It gets the gradients of the loss that
            `backward()` was called on, with whatever weight and scale it had; `sign_perturbation` does not care. None
            is that one in two passes, and `random_sign_perturbation` in `one_pass()`, which draws.
        rows: how rows belong to samples in layers that see others than one a sample, as in `make_apart_step`.
        process_group: ranks to average statistics and their gradients over, so that all of them have one perturbation;
            gradients of parameters are the wrapper's. "world" is all ranks, "local" none but this one. None takes those
            of the `DistributedDataParallel` that `model` is or holds; without one all ranks there are, which it says.
            Every rank enters the same contexts.

    Attributes:
        epsilon: the radius; see `set_epsilon`.
        groups: the ghost groups.
        stats: this rank's batch statistics of the last proxy pass, or of the clean samples of the last `one_pass()`,
            by layer.
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
        process_group: ProcessGroup | Literal["world", "local"] | None = None,
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
        self._proxy: _Context | None = None
        self._inside: str | None = None
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
        self.model.cuda(device)
        return self

    def cpu(self) -> APART:
        """Move the model to the CPU, and return this object."""
        self.model.cpu()
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's parameters, for an optimizer."""
        return self.model.parameters()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters."""
        self.model.zero_grad(set_to_none)

    def set_epsilon(self, epsilon: float | Tensor) -> APART:
        """Change the perturbation radius, from the next adversarial pass on.

        Args:
            epsilon: a number or 0-d tensor ≥ 0; below 1 for a rule of signs.

        Returns:
            This object.

        Raises:
            SettingError: it is out of range.
        """
        check_epsilon(epsilon, kind_of(self._rule("to_adver()")).is_bounded)
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
        layers = self._enter("to_proxy()")
        self._proxy, self.stats, self.stat_grads, self.perturbation = None, {}, {}, {}
        zero = self._zero(layers)
        for leaf in leaves(zero):
            leaf.requires_grad_()
        context = _Context("to_proxy()", self.model, layers, zero, Record(1, copy_into_buffer, self._dtype()), 1, None)
        with self._opened(context):
            yield self
        self._proxy, self.stats = context, context.record.clean_stats()

    @contextmanager
    def to_adver(self) -> Iterator[APART]:
        """Make the passes inside adversarial passes: the statistics are perturbed, in ghost groups.

        No buffer of the model moves, and no frozen parameter.
        """
        layers = self._enter("to_adver()")
        check_groups(self.groups, layers.values())
        stat_grads = self._stat_grads(layers)
        rule, radius, ranks = self._rule("to_adver()"), self._radius(), self._ranks()
        self.stat_grads, self.perturbation = find_perturbation(
            {name: shift for name, shift in self._zero(layers).items() if layers[name].training},
            self.stats,
            {name: stat_grads[name] for name in layers if layers[name].training or name in self.stats},
            lambda stats, grads: rule(stats, grads, radius),
            ranks,
            draws=kind_of(rule).draws,
        )
        point = {**self._zero(layers), **self.perturbation}
        check_perturbation(_channels(layers), point, max(self.groups, 1))
        record = Record(0, copy_into_buffer, self._dtype())
        context = _Context("to_adver()", self.model, layers, point, record, self.groups, self.rows)
        with self._opened(context), _lent_state(self.model, layers):
            yield self
        self._proxy = None

    @contextmanager
    def one_pass(self, clean_fraction: float = 0.5) -> Iterator[APART]:
        """Make the passes inside clean for some ghost groups, and adversarial for the others.

        Random signs are drawn again in every context, and need nothing of the one before. Running statistics move by
        the clean samples.

        Args:
            clean_fraction: share of the groups that are clean, rounded to whole groups: at least one, less than all.
        """
        Settings(clean_fraction=clean_fraction)
        rule = self._rule("one_pass()")
        if kind_of(rule).needs_gradients:
            raise SettingError(
                "one_pass() draws its perturbation, and the rule wants gradients of the step before. Leave rule=None, or "
                "take make_one_pass_step, where a perturbation is a value that goes in and comes out."
            )
        if self.groups in (0, 1):
            raise SettingError(
                f"one_pass() needs ghost groups of both kinds, and groups={self.groups} makes one of the whole batch. Say "
                "APART(model, epsilon, groups=4), with groups of 16 to 64 samples."
            )
        if self.groups > 0:
            clean_groups(clean_fraction, self.groups)
        layers = self._enter("one_pass()")
        check_groups(self.groups, layers.values())
        check_unmixed(self.model)
        ranks, radius, zero = self._ranks(), self._radius(), self._zero(layers)
        training = {name: shift for name, shift in zero.items() if layers[name].training} or zero
        self.perturbation, self._proxy, self.stat_grads = draw_perturbation(rule, training, radius, ranks), None, {}
        rest = {name: shift for name, shift in zero.items() if name not in training}
        point = self.perturbation | (draw_perturbation(rule, rest, radius, ranks) if rest else {})
        check_perturbation(_channels(layers), point, 1)
        record = Record(1, copy_into_buffer, self._dtype())
        context = _Context("one_pass()", self.model, layers, point, record, self.groups, self.rows, clean_fraction)
        with self._opened(context):
            yield self
        self.stats = context.record.clean_stats()

    def _rule(self, context: Literal["to_adver()", "one_pass()"]) -> Rule:
        """Return the user's rule, or that of the context."""
        if self.rule is None:
            return sign_perturbation if context == "to_adver()" else random_sign_perturbation
        return self.rule

    def _settings(self) -> Settings:
        rule = self._rule("to_adver()")
        return Settings(
            epsilon=self.epsilon, groups=self.groups, rule=rule, rows=self.rows, process_group=self.process_group
        )

    def _kind(self) -> tuple[torch.dtype, torch.device]:
        return statistics_kind(dict(self.model.named_parameters()) or dict(named_tensors(self.model)))

    def _dtype(self) -> torch.dtype:
        return self._kind()[0]

    def _radius(self) -> Tensor:
        return scalar(self.epsilon, "epsilon", *self._kind())

    def _zero(self, layers: Mapping[str, Any]) -> PerturbationTree:
        return zero_perturbation(_channels(layers), *self._kind())

    def _enter(self, context: str) -> dict[str, Any]:
        """Find the layers for a context, after a look at what surrounds it."""
        if self._inside:
            raise UsageError(f"{context} was entered inside {self._inside}. Leave one context before the next begins.")
        if torch.is_inference_mode_enabled():
            raise UsageError(f"{context} was entered in inference_mode, where no gradient exists. Leave that mode.")
        self._settings()  # attributes may have been set since
        self._ranks()
        layers = perturbable_layers(self.model)
        if self.model.training and not any(layer.training for layer in layers.values()):
            raise no_training_layer(type(self.model).__name__, len(layers))
        # What autocast has cast in the pass before may have moved since, as by SAM's ascent.
        torch.clear_autocast_cache()
        return layers

    @contextmanager
    def _opened(self, context: _Context) -> Iterator[None]:
        """Lead the layers to the handler of a context while open."""
        # The same interception for the same layers: torch.compile guards on its identity.
        if self._interception is None or self._interception.layers != context.layers:
            self._interception = Interception(context.layers)
        hooks = context.hooks()
        self._inside = context.name
        try:
            with self._interception.installed(context):
                yield
        finally:
            self._inside = None
            for hook in hooks:
                hook.remove()
        context.check_end()

    def _ranks(self) -> Ranks:
        """Return the ranks that find one perturbation, after a look, the first time, at whether they do the same."""
        group, is_guessed = group_of_module(self.process_group, self.model)
        ranks = ranks_of(group)
        if is_guessed and not self._check.is_done:
            warnings.warn(
                "APART found no DistributedDataParallel in the model, and averages statistic gradients over all "
                f"{dist.get_world_size()} ranks of the world. Say process_group='world' if that is meant, or 'local' "
                "to keep those of each rank.",
                stacklevel=5,
            )
        ranks.check(self._check, self._described)
        return ranks

    def _described(self) -> dict[str, str]:
        default = ", the rules of the contexts" if self.rule is None else ""
        return {
            "the settings": f"{type(self).__name__}: {self._settings().described()}{default}",
            "the names, shapes and dtypes of the model's tensors": described_state(dict(named_tensors(self.model))),
            "the batch-norm layers": repr(_channels(batch_norm_layers(self.model))),
        }

    def _stat_grads(self, layers: Mapping[str, Any]) -> StatGradTree:
        """Return the gradients that backward() left of a proxy pass; zero for layers that it did not reach."""
        proxy = self._proxy
        if proxy is None:
            raise UsageError(
                "to_adver() was entered with no proxy pass since the last adversarial one, and its perturbation comes "
                "from there. Run the model, and backward(), under `with apart.to_proxy():` first."
            )
        if layers != proxy.layers:
            changed = sorted(n for n in {*layers, *proxy.layers} if layers.get(n) is not proxy.layers.get(n))
            raise UsageError(
                f"the BN layers are not those of the proxy pass: {changed} came, went, or were replaced. Leave the "
                "model's structure alone between to_proxy() and to_adver()."
            )
        modes = [name for name, layer in layers.items() if layer.training != proxy.modes[name]]
        if modes:
            raise UsageError(
                f"the BN layers in training mode are not those of the proxy pass: {modes} came or went. Leave the model's "
                "modes alone between to_proxy() and to_adver()."
            )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        has_parameter_gradients = any(parameter.grad is not None for parameter in trained)
        if proxy.has_gradients():
            if not has_parameter_gradients and trained:
                raise UsageError(
                    "the gradients of the proxy pass are gone: zero_grad() was called between to_proxy() and to_adver(), "
                    "whose gradients add up. Call it once a step, before to_proxy()."
                )
        elif proxy.has_graph and not has_parameter_gradients:
            raise UsageError(
                "to_adver() was entered with no backward() since the proxy pass, so there are no statistic gradients. "
                "Call backward() on the loss that was computed under to_proxy(), in the context or after it."
            )
        elif proxy.has_graph:
            warnings.warn(
                "the proxy pass left no statistic gradients, so the adversarial pass has no perturbation: "
                "torch.autograd.grad and backward(inputs=...) compute those of what they are given alone. Call "
                "loss.backward().",
                stacklevel=4,
            )
        return proxy.stat_grads()


class _Context:
    """The handler of a context: of every forward of the model it learns the samples, which rows form ghost groups by.

    Attributes:
        name: of the context.
        layers: the model's BN layers, by name.
        modes: whether each was in training mode when the context ended.
        record: of the statistics of all forwards.
        has_graph: whether a layer was called in a way that can be differentiated.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        layers: dict[str, Any],
        point: PerturbationTree,
        record: Record,
        groups: int,
        rows: Rows | None,
        clean_fraction: float | None = None,
    ) -> None:
        self.name, self.layers, self.record, self.has_graph = name, layers, record, False
        self._model, self._point, self._groups, self._rows, self._clean = model, point, groups, rows, clean_fraction
        self._task = backward_task()
        self._forwards: list[PerturbedLayers] = []
        self._depth = 0
        self._is_unknown = False
        self._waiting: set[str] = set()
        self._was_called = False

    @property
    def mixes(self) -> bool:
        """See `Handler`."""
        return self._clean is not None

    @property
    def modes(self) -> dict[str, bool]:
        """See above."""
        return self._modes

    def hooks(self) -> list[Any]:
        """Register hooks that see the input of the model, or of a part of it that is called by itself."""
        modules = [self._model, *self._model.children()]
        before = [m.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True) for m in modules]
        return before + [m.register_forward_hook(_Hook(self._end), always_call=True) for m in modules]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or backward_task() != self._task:
            return
        lengths = {leaf.size(0) for leaf in tensors_of((args, kwargs)) if leaf.dim()}
        self._is_unknown = len(lengths) != 1
        self._start(None if self._is_unknown else lengths.pop())

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._forwards:
            self._forwards[-1].check_rows()

    def _start(self, samples: int | None) -> None:
        """Begin a forward of some samples."""
        groups = max(self._groups, 1)
        if samples is not None and any(layer.training for layer in self.layers.values()):
            groups = number_of_groups(self._groups, samples)
        elif self._groups == -1 and samples is not None:
            groups = samples
        self._forwards.append(self._layers_of(Grouping(groups, samples, self._rows)))

    def _layers_of(self, grouping: Grouping) -> PerturbedLayers:
        point, record = self._point, self.record
        if self._clean is not None:
            record.clean = clean_groups(self._clean, grouping.groups)
            point = {name: _in_groups(shift, record.clean, grouping.groups) for name, shift in point.items()}
        return PerturbedLayers(point, grouping, record, self._task)

    def normalize(self, call: BatchNormCall) -> Tensor:
        """See `Handler`."""
        if not self._forwards or (self._depth == 0 and backward_task() == self._task):
            self._is_unknown = False  # nobody called the model: its layer sees samples
            self._start(len(call.x))
        if self._is_unknown and self._groups not in (0, 1) and not callable(self._rows):
            raise BatchError(
                f"layer {call.name!r} is in ghost groups, which are groups of samples, and the model's input does not say "
                "how many samples there are: it holds no tensor, or tensors of unlike lengths on dim 0. Pass tensors with "
                "an entry a sample, say rows=function, with (layer, input) -> sample of every row, or use groups=1."
            )
        again = backward_task() != self._task
        if again:  # it ends in the middle of the last layer, once all is there that its segment saved
            self._waiting.discard(call.name)
        y = self._forward_of(call.x, again).normalize(call)
        self._was_called = True
        self.has_graph |= y.requires_grad
        if not again and is_checkpointed() and y.requires_grad:
            self._waiting.add(call.name)
        return y

    def _forward_of(self, x: Tensor, again: bool) -> PerturbedLayers:
        """Return the handler of the forward that a call is of; one that runs again, by its number of samples."""
        if again and len(self._forwards) > 1:
            alike = [forward for forward in self._forwards if forward.grouping.samples == len(x)]
            return (alike or self._forwards)[-1]
        return self._forwards[-1]

    def check_end(self) -> None:
        """Make sure, when the context is left, that it has seen all there is to see.

        Raises:
            ModelError: the model ran, and all of its BN layers in evaluation mode.
            UsageError: checkpointed layers have not run again.
        """
        self._modes = {name: layer.training for name, layer in self.layers.items()}
        if self._forwards and not self._was_called and not any(self._modes.values()):
            raise no_training_layer(type(self._model).__name__, len(self.layers))
        if self._waiting:
            raise UsageError(
                f"{self.name} was left before backward(), and out here that would run the checkpointed layers "
                f"{sorted(self._waiting)} again as plain batch norm. Call backward() inside the context."
            )

    def has_gradients(self) -> bool:
        """Return whether backward() has left statistic gradients."""
        return any(leaf.grad is not None for leaf in leaves(self._point))

    def stat_grads(self) -> StatGradTree:
        """Return the statistic gradients that backward() has left, zero for layers that it did not reach."""

        def gradient(leaf: Tensor) -> Tensor:
            return torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad.detach()

        return {name: StatGrads(gradient(mean), gradient(scale)) for name, (mean, scale) in self._point.items()}


class _Hook:
    """A hook of a context. A copy of the model is in no context, and its hook does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, (_nothing,))


def _nothing(*arguments: Any) -> None:
    """Do nothing."""


def _in_groups(shift: Perturbation, clean: int, groups: int) -> Perturbation:
    """Return a perturbation of each group, `(G, C)`, none of the clean ones."""
    is_perturbed = (torch.arange(groups, device=shift.mean.device) >= clean).to(shift.mean.dtype).unsqueeze(1)
    return Perturbation(is_perturbed * shift.mean, is_perturbed * shift.scale)


def _channels(layers: Mapping[str, Any]) -> dict[str, int]:
    return {name: layer.num_features for name, layer in layers.items()}


@contextmanager
def _lent_state(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[None]:
    """Let modules work on copies of their buffers and frozen parameters while open, and put the originals back."""
    stock = {id(layer) for layer in layers.values() if is_stock(layer)}
    originals = [
        (register, key, tensor)
        for module in model.modules()
        for register in (module._parameters, *(() if id(module) in stock else (module._buffers,)))
        for key, tensor in register.items()
        if tensor is not None and not tensor.requires_grad
    ]
    copies: dict[int, Any] = {id(tensor): tensor.clone() for _, _, tensor in originals}
    for register, key, tensor in originals:
        register[key] = copies[id(tensor)]
    try:
        yield
    finally:
        for register, key, tensor in originals:
            register[key] = tensor
