"""APART under Lightning's automatic optimization: a callback, and no change in the `LightningModule`.

    Trainer(callbacks=[OnePassApart(epsilon=0.2, groups=4)])         # costs what plain training costs
    Trainer(callbacks=[TwoPassApart(epsilon=0.1, groups=16)])        # calls training_step twice for every batch

`training_step` returns the plain loss. Every call of a network in it is a batch of its own, as in a loop by hand.

The callbacks stand around `Strategy.training_step` and `Strategy.backward`, which every forward and backward goes
through, once for every call of the optimizer's closure. Hooks of callbacks would not do: none runs before the forward
when a closure is called again, and Lightning clears gradients between `training_step` and its own backward. That is
also why a `backward()` inside `training_step` would be lost, and is refused.
"""

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_func import APART, BatchError, Rule, Settings, UsageError, random_sign_perturbation, sign_perturbation
from apart_func.layer.rows import Rows
from apart_func.one_pass import clean_groups
from apart_func.step import adversarial_samples
from apart_func.trees import batch_size, cut_batch

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.distributed import ProcessGroup
else:  # Lightning has two names, whose classes do not mix: take the one that is imported already
    names = sorted(["lightning.pytorch", "pytorch_lightning"], key=lambda name: name not in sys.modules)
    found = [name for name in names if find_spec(name.split(".")[0])]
    if not found:
        raise ModuleNotFoundError("these callbacks need Lightning: pip install 'apart_func[lightning]'")
    Callback = import_module(found[0]).Callback

Passes = Generator[tuple[float, Any], None, None]


class _ApartCallback(Callback, ABC):
    """Run the forwards and backwards of the strategy in APART's contexts.

    Attributes:
        apart: the drop-in of the run, for `set_epsilon` and what it has found; None before training begins.
    """

    def __init__(self, settings: Settings) -> None:
        self.apart: APART | None = None
        self._settings = settings
        self._open: Passes | None = None  # the passes of a step, from its forward until its backward

    @abstractmethod
    def _passes(self, apart: APART, pl_module: "LightningModule", args: Any) -> Passes:
        """Enter the context of each pass, and yield the weight of its loss and the arguments of `training_step`."""

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Refuse what cannot work, before anything is set up."""
        if stage == "fit":
            _check(self, trainer, pl_module)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Stand around the strategy's forward and backward."""
        strategy, settings = trainer.strategy, self._settings
        plain_step, plain_backward = strategy.training_step, strategy.backward
        networks = _Networks(trainer.model, pl_module)
        apart = self.apart = APART(
            networks,
            settings.epsilon,
            settings.groups,
            rule=settings.rule,
            rows=settings.rows,
            process_group=settings.process_group,
        )
        weight = 1.0

        def training_step(*args: Any) -> Any:
            nonlocal weight
            if trainer.fit_loop._skip_backward:  # the last epoch of SWA, which only takes running statistics
                return plain_step(*args)
            before = _gradients(pl_module)
            self._open = self._passes(apart, pl_module, args)
            weight, args = next(self._open)
            with networks.routed():
                output = plain_step(*args)
            _check_gradients(before, _gradients(pl_module))
            if _loss_of(output) is None:  # Lightning skips this batch
                self._open.close()
            return output

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            done = plain_backward(weight * loss, *args, **kwargs)
            for second_weight, second_args in self._open or ():
                with networks.routed():
                    second_loss = _loss_of(plain_step(*second_args))
                if second_loss is None:
                    raise UsageError(
                        "training_step returned a loss for the clean batch, and none for the perturbed one. Return one "
                        "for both, or for none of them."
                    )
                plain_backward(second_weight * second_loss / trainer.accumulate_grad_batches, *args, **kwargs)
            return done

        vars(strategy).update(training_step=training_step, backward=backward)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Leave the strategy as it was."""
        for name in ("training_step", "backward"):
            vars(trainer.strategy).pop(name, None)

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Leave the context and the strategy."""
        if self._open is not None:
            self._open.close()
        self.on_train_end(trainer, pl_module)


class OnePassApart(_ApartCallback):
    """Train in `APART(...).one_pass()`: a part of the ghost groups is clean, the others are perturbed.

    What `training_step` logs is of clean and perturbed samples together.

    Args:
        epsilon: perturbation radius 0 ≤ ε < 1, as a fraction of the statistic.
        groups: ghost groups of a batch, at least 2; they must divide it (`drop_last=True`).
        clean_fraction: share of the groups that are clean, rounded to whole groups.
        rows: how rows belong to samples, as in `APART`.
        process_group: None takes the ranks of the strategy's `DistributedDataParallel`.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        epsilon: float | Tensor,
        groups: int,
        clean_fraction: float = 0.5,
        *,
        rows: Rows | None = None,
        process_group: "ProcessGroup | Literal['world', 'local'] | None" = None,
    ) -> None:
        clean_groups(clean_fraction, groups)
        super().__init__(
            Settings(
                epsilon,
                groups,
                clean_fraction=clean_fraction,
                rule=random_sign_perturbation,
                rows=rows,
                process_group=process_group,
            )
        )

    def _passes(self, apart: APART, pl_module: "LightningModule", args: Any) -> Passes:
        with apart.one_pass(self._settings.clean_fraction):
            yield 1.0, args


class TwoPassApart(_ApartCallback):
    """Train in `APART(...).to_proxy()` and `.to_adver()`: `training_step` runs again, perturbed, after its backward.

    The second call gets the first samples of the batch. It logs nothing, and metrics of torchmetrics do not count it;
    whatever else `training_step` does, it does twice, and it may draw other random numbers. Hooks around the backward
    are called for both.

    Args:
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs.
        groups: ghost groups of the adversarial pass, as in `APART`.
        ratio: share of the samples in the adversarial pass; below 1 for one loader only.
        rule: as in `APART`, like the other arguments.
        rows: how rows belong to samples.
        process_group: None takes the ranks of the strategy's `DistributedDataParallel`.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        epsilon: float | Tensor = 0.1,
        groups: int = 0,
        ratio: float = 1.0,
        *,
        rule: Rule = sign_perturbation,
        rows: Rows | None = None,
        process_group: "ProcessGroup | Literal['world', 'local'] | None" = None,
    ) -> None:
        super().__init__(Settings(epsilon, groups, ratio, rule=rule, rows=rows, process_group=process_group))
        self._spares: dict[nn.Module, Any] = {}  # metrics for the second call

    def _passes(self, apart: APART, pl_module: "LightningModule", args: Any) -> Passes:
        second_args, r = _adversarial_part(args, self._settings)
        with apart.to_proxy():
            yield r, args
        with apart.to_adver(), _aside(pl_module, self._spares):
            yield 1 - r, second_args


class _Networks(nn.Module):
    """The networks of a `LightningModule` as one module, whose forward is the outermost call of any of them.

    `APART` takes the samples of a forward from the arguments of its model, and `training_step` calls no model but the
    networks that the `LightningModule` holds; with several loaders each call has samples of its own.
    """

    def __init__(self, model: nn.Module | None, pl_module: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._called = [pl_module, *_called_networks(pl_module)]
        self._forward: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network whose turn it is."""
        assert self._forward is not None
        return self._forward(*args, **kwargs)

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Lead every outermost call of a network through this module while open."""
        before = [vars(network).get("forward") for network in self._called]
        for network in self._called:
            network.forward = self._through(network.forward)
        try:
            yield
        finally:
            for network, forward in zip(self._called, before, strict=True):
                vars(network).pop("forward", None) if forward is None else vars(network).update(forward=forward)

    def _through(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._forward is not None:
                return forward(*args, **kwargs)
            self._forward = forward
            try:
                return self(*args, **kwargs)
            finally:
                self._forward = None

        return call


def _called_networks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with BN layers that `training_step` can call: children, also those in lists and dicts."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_networks(child)
        elif not isinstance(child, _BatchNorm) and any(isinstance(part, _BatchNorm) for part in child.modules()):
            yield child


def _loss_of(output: Any) -> Any:
    """The loss in what `training_step` returned; None to skip the batch."""
    return output.get("loss") if isinstance(output, dict) else output


def _adversarial_part(args: Any, settings: Settings) -> tuple[Any, float]:
    """The arguments of the second call, which has N of the M samples, and r = M / (M + N)."""
    if settings.ratio == 1:
        return args, 0.5
    try:
        samples = batch_size(args)
    except BatchError as error:
        raise BatchError(
            f"TwoPassApart(ratio={settings.ratio}) takes the first samples of a batch, and {error} With several loaders "
            "use ratio=1, or OnePassApart."
        ) from error
    chosen = adversarial_samples(samples, settings)
    return cut_batch(args, 0, chosen), samples / (samples + chosen)


def _check(callback: _ApartCallback, trainer: Any, pl_module: "LightningModule") -> None:
    name = type(callback).__name__
    if not pl_module.automatic_optimization:
        raise UsageError(
            f"{type(pl_module).__name__} has automatic_optimization = False, and {name} works in Lightning's own "
            "optimization. Set it to True; or leave the callback out, and put APART's contexts around manual_backward()."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise UsageError(
            f"{type(trainer.strategy).__name__} accumulates and reduces gradients itself, which {name} does not "
            "support. Use strategy='ddp' or 'auto'."
        )
    others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, _ApartCallback)]
    if len(others) > 1:
        raise UsageError(f"the trainer has {' and '.join(others)} among its callbacks. Keep one of them.")
    if (
        isinstance(callback, TwoPassApart)
        and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
    ):
        raise UsageError(
            "training_step takes its batches from a dataloader_iter, and TwoPassApart calls it twice for each. Give it "
            "(batch, batch_idx), or use OnePassApart."
        )


def _gradients(module: nn.Module) -> list[tuple[Tensor | None, int]]:
    """The gradients of all parameters, with a number that tells whether one was written to."""
    return [(p.grad, -1 if p.grad is None else p.grad._version) for p in module.parameters()]


def _check_gradients(before: list[tuple[Tensor | None, int]], after: list[tuple[Tensor | None, int]]) -> None:
    """Make sure that `training_step` ran no backward."""
    if any(old is not new or old_version != version for (old, old_version), (new, version) in zip(before, after)):
        raise UsageError(
            "training_step called backward(). Lightning clears gradients after training_step, so that those would be "
            "lost: half of a gradient, where they are of a proxy pass. Return the plain loss, and call no backward(); "
            "the callback takes care of both passes."
        )


@contextmanager
def _aside(pl_module: "LightningModule", spares: dict[nn.Module, Any]) -> Iterator[None]:
    """Let `training_step` log nothing while open, and count in spare metrics."""
    from torchmetrics import Metric, MetricCollection  # it comes with Lightning

    kinds = (Metric, MetricCollection)
    parents = [module for module in pl_module.modules() if not isinstance(module, kinds)]
    places = [
        (parent._modules, key, child)
        for parent in parents
        for key, child in parent._modules.items()
        if isinstance(child, kinds)
    ]
    for children, key, metric in places:
        if metric not in spares:
            spares[metric] = copy.deepcopy(metric)
        spares[metric].reset()
        children[key] = spares[metric]
    vars(pl_module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del vars(pl_module)["log"]
        for children, key, metric in places:
            children[key] = metric
