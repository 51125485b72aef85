"""APART for a loop built on `loss.backward()`: a context around each pass.

    apart = APART(model, epsilon=0.1, groups=16)
    with apart.to_proxy():                                       # plain training, and ∂L_p/∂δ on the way
        (r * criterion(model(x), y)).backward()
    with apart.to_adver():                                       # δ = ε · sign(∂L_p/∂δ), statistics pushed by δ
        ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

or both in one, of which half the ghost groups are clean, and half have their statistics pushed by random signs:

    with apart.one_pass():
        criterion(model(x), y).backward()

Inside a context the model's BN layers hand their input to the layer of `layer/`, by the interception of `intercept.py`:
both are those of the functional step. Outside, the model is as the user made it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func._torch import is_checkpointed, is_recomputing, is_traced
from apart_func.distributed import Agreement, check_groups, described_state, is_synchronised, ranks_of_module
from apart_func.errors import StateError, UsageError
from apart_func.functional import check_model, counted_layers, named_tensors, unwrapped_names
from apart_func.intercept import Route, Site, batch_norm_layers, check_unmixed, is_stock, training_layers
from apart_func.layer.affine import FlatShifts, Parameters, flat_shifts
from apart_func.layer.rows import Grouping, Rows
from apart_func.layers import ALL, CleanLayers, MixedLayers, ShiftedLayers
from apart_func.one_pass import clean_groups, clean_stat_grads, drawn_perturbation
from apart_func.passes import check_perturbation, statistics_like, zero_shifts
from apart_func.rules import (
    IterativeRule,
    Rule,
    check_epsilon,
    is_drawn,
    may_draw,
    random_sign_perturbation,
    sign_perturbation,
)
from apart_func.running import overwrite
from apart_func.settings import Settings, scalar
from apart_func.step import found_perturbation
from apart_func.trees import (
    Perturbation,
    PerturbationTree,
    StatGrads,
    StatGradTree,
    StatTree,
    all_finite,
    tensors_of,
    vectors,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Layers = dict[str, _BatchNorm]


class APART:
    """The drop-in form of the method: `to_proxy()` and `to_adver()` around the two passes of a training step.

        apart = APART(model, epsilon=0.1, groups=16)
        with apart.to_proxy():
            (r * criterion(model(x), y)).backward()                            # r = M / (M + N)
        with apart.to_adver():
            ((1 - r) * criterion(model(x[:N]), y[:N])).backward()

    or `one_pass()` around one, with `criterion(model(x), y).backward()` in it.

    `backward()` may be called inside a context or after it; with activation checkpointing (`use_reentrant=False`)
    inside. Where gradients are accumulated over micro-batches, each of them goes through both contexts in turn.
    Running statistics move at each call of a layer, as in plain training.

    Args:
        model: any module with BN layers. They are found when a context is entered: those in training mode then. A
            compiled model is one graph for each pass; compile it with `dynamic=False` if the adversarial pass gets
            fewer samples.
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs. Random signs,
            as of `one_pass()`, want about twice the radius of those of the gradient: try 0.1 to 0.4.
        groups: ghost groups of the adversarial pass; sample i is in group i mod `groups`. 0 and 1 make one group of
            the whole batch, -1 makes a group of every sample.
        rule: makes the perturbation from statistics and their gradients. It gets the gradients of the loss that
            `backward()` was called on, with whatever weight and scale it had; `sign_perturbation` does not care. None
            is that one in two passes, and `random_sign_perturbation` in `one_pass()`.
        rows: how rows belong to samples in layers that see others than one a sample, as in `make_apart_step`.
        process_group: ranks to average statistics and their gradients over, so that all of them have one perturbation;
            gradients of parameters are the wrapper's. "world" is all ranks, "local" none but this one. None takes those
            of the `DistributedDataParallel` that `model` is or holds; without one all ranks there are, which it says.
            Every rank enters the same contexts, and calls `state_dict()` where one does.

    Attributes:
        epsilon: the radius; see `set_epsilon`.
        groups: the ghost groups.
        stats: this rank's batch statistics of the last proxy pass, or of the clean samples of the last `one_pass()`,
            by layer.
        stat_grads: their gradients, averaged over ranks; there once a perturbation is made from them.
        perturbation: δ of the last adversarial pass, or of the last `one_pass()`.

    Raises:
        ApartError: a setting is out of range; entering a context also where the model has no BN layer in training mode,
            or where the order of contexts and `backward()` is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float | Tensor = 0.1,
        groups: int = 0,
        *,
        rule: Rule | None = None,
        rows: Rows | None = None,
        process_group: "ProcessGroup | Literal['world', 'local'] | None" = None,
    ) -> None:
        check_model(model)
        if isinstance(rule, IterativeRule):
            raise rule.refusal()
        self.model, self.epsilon, self.groups, self.rule = model, epsilon, groups, rule
        self.rows, self.process_group = rows, process_group
        self._settings()
        Settings(process_group=process_group)
        self.stats: StatTree = {}
        self.stat_grads: StatGradTree = {}
        self.perturbation: PerturbationTree = {}
        self._proxy: _Proxy | None = None
        self._mixed: _Mixed | None = None
        self._agreement = Agreement()
        self._inside: str | None = None
        self._route: Route | None = None

    def __repr__(self) -> str:
        layers = counted_layers(len(batch_norm_layers(self.model)))
        return f"APART({type(self.model).__name__}, {layers}, {self._settings()})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_route": None}  # a copy has layers of its own

    def set_epsilon(self, epsilon: float | Tensor) -> None:
        """Change the perturbation radius, from the next adversarial pass on.

        Args:
            epsilon: a number or 0-d tensor ≥ 0; below 1 for a rule of signs.

        Raises:
            SettingError: it is out of range.
        """
        check_epsilon(epsilon, self._rule("to_adver()"))
        self.epsilon = epsilon

    @contextmanager
    def to_proxy(self) -> Iterator[None]:
        """Make the passes inside proxy passes: plain training, which also yields the statistic gradients."""
        layers = self._enter("to_proxy()")
        handler = _ProxyLayers(_channels(layers), self._like())
        self._proxy, self._mixed, self.stats, self.stat_grads, self.perturbation = None, None, {}, {}, {}
        with self._opened("to_proxy()", layers, _Forwards(handler, layers, 1, None)):
            yield
        self._proxy, self.stats = _Proxy(layers, handler), handler.statistics()

    @contextmanager
    def to_adver(self) -> Iterator[None]:
        """Make the passes inside adversarial passes: the statistics are perturbed, in ghost groups.

        No buffer of the model moves.
        """
        layers = self._enter("to_adver()")
        channels, like = _channels(layers), self._like()
        check_groups(self.groups, layers.values())
        stat_grads = _stat_grads(self._proxy, layers)
        rule = self._rule("to_adver()")
        self.stat_grads, self.perturbation = self._perturbation(rule, zero_shifts(channels, like), stat_grads)
        check_perturbation(channels, self.perturbation, max(self.groups, 1))
        stock = {layer for layer in layers.values() if is_stock(layer)}
        buffers = [(module, key) for module in self.model.modules() if module not in stock for key in module._buffers]
        handler = ShiftedLayers(channels, self.perturbation, Grouping(1, None))
        with self._opened("to_adver()", layers, _Forwards(handler, layers, self.groups, self.rows)), _lent(buffers):
            yield
        self._proxy = None

    @contextmanager
    def one_pass(self, clean_fraction: float = 0.5) -> Iterator[None]:
        """Make the passes inside clean for some ghost groups, and adversarial for the others.

        Random signs are drawn anew in every context, and need nothing of the one before. Any other rule finds the
        perturbation from the gradients of the clean groups of the context before; there is none in the first one, and
        it is kept where those gradients are not finite (as after an overflow of float16) or there are none. Running
        statistics move by the clean samples.

        Args:
            clean_fraction: share of the groups that are clean, rounded to whole groups: at least one, less than all.
        """
        Settings(clean_fraction=clean_fraction)
        clean = clean_groups(clean_fraction, self.groups)
        layers = self._enter("one_pass()")
        check_groups(self.groups, layers.values())
        check_unmixed(self.model)
        channels, like = _channels(layers), self._like()
        rule, shifts = self._rule("one_pass()"), zero_shifts(channels, like)
        carries = not is_drawn(rule)
        if carries:
            self._find_perturbation()
            shifts |= {layer: shift for layer, shift in self.perturbation.items() if layer in layers}
        else:
            shifts, self.stat_grads = drawn_perturbation(rule, shifts, self._radius(), self._ranks()), {}
        check_perturbation(channels, shifts, 1)
        self.perturbation, self._proxy, self._mixed = shifts, None, None
        leaves = flat_shifts(shifts, channels, self.groups, clean, like.dtype)
        for leaf in leaves:
            leaf.requires_grad_(carries)
        handler = MixedLayers(channels, {ALL: leaves}, Grouping(self.groups, None), clean, overwrite, like.dtype)
        with self._opened("one_pass()", layers, _Forwards(handler, layers, self.groups, self.rows)):
            yield
        self._mixed = _Mixed(leaves, channels, self.groups, clean) if carries else None
        self.stats = handler.record.statistics()

    def state_dict(self) -> dict[str, Any]:
        """What the next `one_pass()` depends on, for a checkpoint: its perturbation. See `save_with`.

        Random signs do not depend on those of the `one_pass()` before, which are then here.
        """
        self._find_perturbation()
        return {"perturbation": {layer: tuple(shift) for layer, shift in self.perturbation.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned, of this model or of one in other wrappers.

        Raises:
            StateError: it is no such state, does not fit the model, or is not finite; nothing is then changed.
        """
        self.perturbation = self._checked_state(state)
        self._mixed = None

    def save_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep `state_dict()` in that of an optimizer from now on, and so in every checkpoint that the optimizer is in.

        It stands there under "apart", and is loaded from there. The perturbation is then found in each step of the
        optimizer, which all ranks take, so that one of them may save by itself; not after a step that a scaler skipped.
        Random signs leave nothing to save, and the optimizer is left alone.

        Raises:
            UsageError: it is no optimizer of torch, or one without hooks. The optimizer raises a `StateError` itself
                where it is to load a state without a perturbation: to go on from a plain run, load that first.
        """
        try:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise AttributeError
            if is_drawn(self._rule("one_pass()")):
                return
            optimizer.register_state_dict_post_hook(lambda _, state: {**state, "apart": self.state_dict()})
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self.load_state_dict(state.get("apart", {})))
            optimizer.register_step_post_hook(lambda *_: self._find_perturbation())
        except AttributeError as error:
            raise UsageError(
                f"{type(optimizer).__name__} takes no hooks for its state; expected a torch.optim.Optimizer, of torch "
                "from 2.1 on. Pass the one that it wraps, or save apart.state_dict() in the checkpoint yourself."
            ) from error

    def _checked_state(self, state: Any) -> PerturbationTree:
        perturbation = state.get("perturbation") if isinstance(state, Mapping) else None
        if not isinstance(perturbation, Mapping):
            raise StateError("the state holds no perturbation by layer; expected what apart.state_dict() returned.")
        layers = batch_norm_layers(self.model)
        saved, names = unwrapped_names(perturbation), unwrapped_names({name: name for name in layers})
        unknown = sorted(set(saved) - set(names))
        if unknown:
            raise StateError(
                f"the state has perturbations of {unknown}, and no BN layer has that name: {sorted(names)}."
            )
        found: PerturbationTree = {}
        for name, pair in saved.items():
            channels = layers[names[name]].num_features
            good = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
            if not good or any(part.shape != (channels,) for part in pair):
                shapes = [tuple(part.shape) for part in pair] if good else type(pair).__name__
                raise StateError(
                    f"the perturbation of layer {name!r} is {shapes}; expected two tensors of ({channels},)."
                )
            if not all_finite(pair):
                raise StateError(f"the perturbation of layer {name!r} is not finite. Go on from an earlier checkpoint.")
            found[names[name]] = Perturbation(*(part.detach().to(self._like()) for part in pair))
        return found

    def _find_perturbation(self) -> None:
        """Make the perturbation from the gradients that backward() left in the shifts of a `one_pass()`."""
        mixed, self._mixed = self._mixed, None
        if mixed is None or all(leaf.grad is None for leaf in mixed.leaves):
            return
        grads = FlatShifts(*map(_gradient, mixed.leaves)).by_layer(mixed.channels, mixed.groups)
        stat_grads = {layer: StatGrads(*pair) for layer, pair in grads.items()}
        rule = self._rule("one_pass()")
        stat_grads, found = self._perturbation(rule, self.perturbation, clean_stat_grads(stat_grads, mixed.clean))
        if not all_finite(vectors(stat_grads)):
            return
        self.stat_grads = stat_grads
        if all_finite(vectors(found)):
            self.perturbation = found

    def _ranks(self) -> "ProcessGroup | None":
        """The ranks that find one perturbation, after a look at whether they do the same, the first time."""
        group, guessed = ranks_of_module(self.process_group, self.model)

        def described() -> dict[str, str]:
            default = ", the rules of the contexts" if self.rule is None else ""
            layers = {name: layer.num_features for name, layer in batch_norm_layers(self.model).items()}
            return {
                "the settings": f"{type(self).__name__}: {self._settings().described()}{default}",
                "the names, shapes and dtypes of the model's tensors": described_state(dict(named_tensors(self.model))),
                "the batch-norm layers": repr(layers),
            }

        if guessed and not self._agreement.reached:
            warnings.warn(
                "APART found no DistributedDataParallel in the model, and averages statistic gradients over all "
                f"{dist.get_world_size()} ranks of the world. Say process_group='world' if that is meant, or 'local' "
                "to keep those of each rank.",
                stacklevel=5,
            )
        self._agreement.reach(group, described)
        return group

    def _settings(self) -> Settings:
        return Settings(epsilon=self.epsilon, groups=self.groups, rule=self._rule("to_adver()"), rows=self.rows)

    def _rule(self, context: Literal["to_adver()", "one_pass()"]) -> Rule:
        """The user's rule, or the best of the context."""
        if self.rule is None:
            return sign_perturbation if context == "to_adver()" else random_sign_perturbation
        return self.rule

    def _radius(self) -> Tensor:
        return scalar(self.epsilon, "epsilon", self._like().dtype, self._like().device)

    def _like(self) -> Tensor:
        return statistics_like(dict(named_tensors(self.model)))

    def _enter(self, context: str) -> Layers:
        """Find the layers for a context, after a look at what surrounds it."""
        if self._inside:
            raise UsageError(f"{context} was entered inside {self._inside}. Leave one context before the next begins.")
        if torch.is_inference_mode_enabled():
            raise UsageError(f"{context} was entered in inference_mode, where no gradient exists. Leave that mode.")
        self._ranks()
        # What autocast has cast in the pass before may have moved since, as by SAM's ascent.
        torch.clear_autocast_cache()
        return training_layers(self.model)

    @contextmanager
    def _opened(self, context: str, layers: Layers, forwards: "_Forwards") -> Iterator[None]:
        """Lead the layers to a handler while open."""
        hooks = (
            self.model.register_forward_pre_hook(_Hook(forwards.begin), with_kwargs=True),
            self.model.register_forward_hook(_Hook(forwards.end)),
        )
        self._inside = context
        try:
            with self._route_of(layers).opened(forwards):
                yield
        finally:
            self._inside = None
            for hook in hooks:
                hook.remove()
        if forwards.waiting:
            raise UsageError(
                f"{context} was left before backward(), and out here that would run the checkpointed layers "
                f"{sorted(forwards.waiting)} again as plain batch norm. Call backward() inside the context."
            )

    def _route_of(self, layers: Layers) -> Route:
        """The same one for the same layers: a compiler looks at whether it is."""
        if self._route is None or self._route.layers != layers:
            self._route = Route(layers)
        return self._route

    def _perturbation(
        self, rule: Rule, before: PerturbationTree, stat_grads: StatGradTree
    ) -> tuple[StatGradTree, PerturbationTree]:
        radius = self._radius()
        return found_perturbation(
            before,
            self.stats,
            stat_grads,
            lambda stats, grads: rule(stats, grads, radius),
            self._ranks(),
            may_draw(rule),
        )


class _Proxy(NamedTuple):
    """What a proxy pass leaves for the adversarial pass: its layers, and what backward() leaves gradients in."""

    layers: Layers
    handler: "_ProxyLayers"


class _Mixed(NamedTuple):
    """What a `one_pass()` leaves for the next: the leaves that backward() gives gradients, and what they are of."""

    leaves: FlatShifts
    channels: dict[str, int]
    groups: int
    clean: int


class _ProxyLayers:
    """Batch norm at δ = 0. Compilers differentiate by arguments, so there zero shifts are one; also for other ranks."""

    def __init__(self, channels: dict[str, int], like: Tensor) -> None:
        self.channels = channels
        self._clean = CleanLayers(channels, overwrite, like, retain=True)
        self._zero = zero_shifts(channels, like)
        self._traced = MixedLayers(channels, self._zero, Grouping(1, None), 1, overwrite, like.dtype)
        for leaf in vectors(self._zero):
            leaf.requires_grad_()

    def prepare(self, parameters: dict[str, Parameters]) -> None:
        """Prepare a forward."""
        self._clean.prepare(parameters)

    def expect(self, is_prepared: bool, has_graph: bool) -> None:
        """See `ShiftedLayers.expect`."""
        self._clean.expect(is_prepared, has_graph)

    def __call__(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        by_shifts = is_traced() or is_synchronised(site.layer)
        return (self._traced if by_shifts else self._clean)(site, x, weight, bias, eps)

    def leaves(self) -> list[Tensor]:
        """What backward() leaves gradients in."""
        return [*self._clean.taps(), *vectors(self._zero)]

    def statistics(self) -> StatTree:
        """Statistics of the layers that were called."""
        return self._clean.statistics() | self._traced.record.statistics()

    def stat_grads(self) -> StatGradTree:
        """The gradients that backward() has left."""
        eager = self._clean.stat_grads([_gradient(tap) for tap in self._clean.taps()])
        if not self._traced.record.statistics():
            return eager
        traced = {layer: StatGrads(*map(_gradient, shift)) for layer, shift in self._zero.items()}
        return {
            layer: StatGrads(g.mean + traced[layer].mean, g.scale + traced[layer].scale) for layer, g in eager.items()
        }


class _Forwards:
    """The handler of a context. Of every forward of the model it learns the samples, by which rows form ghost groups.

    Attributes:
        waiting: checkpointed layers that have not been run again yet.
    """

    def __init__(self, layer: "ShiftedLayers | _ProxyLayers", layers: Layers, groups: int, rows: Rows | None) -> None:
        self._layer, self._layers, self._groups, self._rows = layer, layers, groups, rows
        self._samples: int | None = None
        self._running = False
        self._without_graph: set[str] = set()  # layers that a reentrant checkpoint will run again, with a graph then
        self.waiting: set[str] = set()

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at the input of the model, as a hook before its forward."""
        lengths = {leaf.shape[0] for leaf in tensors_of((args, kwargs)) if leaf.dim()}
        self._samples = lengths.pop() if len(lengths) == 1 else None
        self._running = True
        if self._samples is not None:
            self._regroup(self._samples)
        if not is_traced():
            self._layer.prepare({name: Parameters(layer.weight, layer.bias) for name, layer in self._layers.items()})

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that the forward of the model has ended."""
        self._running = False

    @property
    def is_mixed(self) -> bool:
        """Whether clean and perturbed samples are in one batch."""
        return isinstance(self._layer, MixedLayers)

    def _regroup(self, samples: int) -> None:
        if isinstance(self._layer, ShiftedLayers):
            groups = samples if self._groups == -1 else max(self._groups, 1)
            self._layer.grouping = Grouping(groups, samples, self._rows)

    def __call__(self, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if self._samples is None:  # the model itself was not called: its first layer sees samples
            self._samples = x.shape[0]
            self._regroup(self._samples)
        again = is_recomputing()
        if not again and not torch.is_grad_enabled():
            self._without_graph.add(site.name)
        has_graph = site.name not in self._without_graph
        self._layer.expect((self._running or again) and has_graph, has_graph)
        if again:  # it ends in the middle of the last layer, once all is there that its segment saved
            self.waiting.discard(site.name)
        y = self._layer(site, x, weight, bias, eps)
        if not again and is_checkpointed() and y.requires_grad:
            self.waiting.add(site.name)
        return y


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


def _channels(layers: Layers) -> dict[str, int]:
    return {name: layer.num_features for name, layer in layers.items()}


def _stat_grads(proxy: _Proxy | None, layers: Layers) -> StatGradTree:
    """The gradients that backward() left of a proxy pass; zero for layers that it did not reach."""
    if proxy is None:
        raise UsageError(
            "to_adver() was entered with no proxy pass since the last adversarial one, and its perturbation comes from "
            "there. Run the model, and backward(), under `with apart.to_proxy():` first."
        )
    if layers != proxy.layers:
        changed = sorted(name for name in {*layers, *proxy.layers} if layers.get(name) is not proxy.layers.get(name))
        raise UsageError(
            f"the BN layers in training mode are not those of the proxy pass: {changed} came, went, or were replaced. "
            "Leave the model's structure and modes alone between to_proxy() and to_adver()."
        )
    if all(leaf.grad is None for leaf in proxy.handler.leaves()):
        raise UsageError(
            "to_adver() was entered with no backward() since the proxy pass, so there are no statistic gradients. Call "
            "backward() on the loss that was computed under to_proxy(), in the context or after it."
        )
    return proxy.handler.stat_grads()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


@contextmanager
def _lent(buffers: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let modules work on copies of their buffers while open, and put the originals back."""
    originals = [(module._buffers, key, module._buffers[key]) for module, key in buffers]
    copies = {id(tensor): tensor.clone() for _, _, tensor in originals if tensor is not None}
    for register, key, tensor in originals:
        register[key] = copies.get(id(tensor))
    try:
        yield
    finally:
        for register, key, tensor in originals:
            register[key] = tensor
