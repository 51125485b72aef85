"""APART under Lightning's automatic optimisation: a callback, and no change in the `LightningModule`.

    Trainer(callbacks=[OnePassApart(epsilon=0.2, groups=4)])         # what plain training costs
    Trainer(callbacks=[TwoPassApart(epsilon=0.1, groups=16)])        # training_step is called twice a batch

`training_step` returns the plain loss, as ever. Precision plugins, accumulation, clipping, DDP and averaging of weights
work as they do without: the callbacks stand around `Strategy.training_step` and `Strategy.backward`, the two places
that every strategy's forward and backward go through, each once for every call of the optimizer's closure. Hooks of
callbacks would not do: none comes before the forward when a closure is called again, as by LBFGS, and gradients are
cleared between `training_step` and the backward. What is done inside `training_step` by `loss.backward()` is lost
there, such as the proxy pass of contexts opened by hand: half of the gradient. Both callbacks refuse that.

Where `OnePassApart` has a rule of gradients, its perturbation is in Lightning's checkpoints, and a resumed run goes on
bit for bit. With random signs there is no state, and in `TwoPassApart` there is none.
"""

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

from torch import Tensor, nn

from apart_func.dropin import APART
from apart_func.errors import UsageError
from apart_func.layer.rows import Rows
from apart_func.one_pass import clean_groups
from apart_func.rules import Rule, random_sign_perturbation, sign_perturbation
from apart_func.settings import Settings
from apart_func.step import adversarial_samples
from apart_func.trees import batch_size, cut_batch

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.distributed import ProcessGroup
else:  # the package has two names, whose classes do not mix: that of the trainer that is there already
    names = ["lightning.pytorch", "pytorch_lightning"]
    found = [name for name in sorted(names, key=lambda name: name not in sys.modules) if find_spec(name.split(".")[0])]
    if not found:
        raise ModuleNotFoundError("these callbacks need Lightning: pip install 'apart_func[lightning]'")
    Callback = import_module(found[0]).Callback


class _ApartCallback(Callback, ABC):
    """What both forms share: when they stand around the strategy, and what they refuse.

    Attributes:
        apart: the drop-in of the run, for `set_epsilon` and what it has found; None before training begins.
    """

    def __init__(self, settings: Settings) -> None:
        self.apart: APART | None = None
        self._settings = settings
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until there is a model
        self._trained: ref[nn.Module] | None = None  # what `apart` belongs to
        self._open = ExitStack()  # the context that a forward has entered and its backward leaves

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Refuse what cannot work, before anything is set up."""
        if stage == "fit":
            _check(self, trainer, pl_module)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Stand around the strategy's forward and backward."""
        strategy, settings = trainer.strategy, self._settings
        state = self.state_dict() if self._trained is None or self._trained() is pl_module else {}
        whole = _Step(trainer.model, strategy.training_step)
        self.apart = APART(
            whole,
            settings.epsilon,
            settings.groups,
            rule=settings.rule,
            rows=settings.rows,
            process_group=settings.process_group,
        )
        if state:
            self.apart.load_state_dict(state)
        self._loaded, self._trained = None, ref(pl_module)
        forward, backward = self._around(trainer, pl_module, self.apart, strategy.backward)
        vars(strategy).update(training_step=forward, backward=backward)

    @abstractmethod
    def _around(
        self, trainer: "Trainer", pl_module: "LightningModule", apart: APART, backward: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What stands in for the strategy's `training_step` and `backward`."""

    def _forward(self, apart: APART, context: AbstractContextManager[None], args: Any, kwargs: Any) -> Any:
        """Run a training step in a context, and leave it open for the backward if there is to be one."""
        before = _gradients(apart.model)
        with ExitStack() as stack:
            stack.enter_context(context)
            output = apart.model(*args, **kwargs)
            _check_gradients(before)
            if _loss_of(output) is not None:
                self._open = stack.pop_all()
        return output

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Leave the strategy as it was."""
        for name in ("training_step", "backward"):
            vars(trainer.strategy).pop(name, None)

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Leave the context and the strategy."""
        context, self._open = self._open, ExitStack()
        context.__exit__(type(exception), exception, exception.__traceback__)
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it once the model is there."""
        self._loaded, self._trained = state_dict, None


class OnePassApart(_ApartCallback):
    """Train in `APART(...).one_pass()`: a part of the ghost groups is clean, the others are perturbed.

    What `training_step` logs is of both kinds of samples together. Random signs are drawn as the forward begins; other
    rules find the perturbation of a step right after the backward before it, with the radius of that time.

    Args:
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs; for random ones
            try 0.1 to 0.4.
        groups: ghost groups of a batch, at least 2; they must divide it (`drop_last=True`).
        clean_fraction: share of the groups that are clean, rounded to whole groups.
        rule: as in `APART`, like the other arguments; random signs by default.
        rows: how rows belong to samples.
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
        rule: Rule = random_sign_perturbation,
        rows: Rows | None = None,
        process_group: "ProcessGroup | Literal['world', 'local'] | None" = None,
    ) -> None:
        settings = Settings(
            epsilon=epsilon,
            groups=groups,
            clean_fraction=clean_fraction,
            rule=rule,
            rows=rows,
            process_group=process_group,
        )
        clean_groups(clean_fraction, groups)
        super().__init__(settings)

    def _around(
        self, trainer: "Trainer", pl_module: "LightningModule", apart: APART, backward: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def forward_once(*args: Any, **kwargs: Any) -> Any:
            if trainer.fit_loop._skip_backward:  # SWA's last epoch, which takes running statistics alone
                return apart.model(*args, **kwargs)
            return self._forward(apart, apart.one_pass(self._settings.clean_fraction), args, kwargs)

        def backward_once(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self._open:
                done = backward(loss, *args, **kwargs)
            apart.state_dict()  # finds δ here, where all ranks are; whoever saves a checkpoint may be one of them
            return done

        return forward_once, backward_once

    def state_dict(self) -> dict[str, Any]:
        """The perturbation of the next step."""
        return super().state_dict() if self._loaded or self.apart is None else self.apart.state_dict()


class TwoPassApart(_ApartCallback):
    """Train in `APART(...).to_proxy()` and `.to_adver()`: `training_step` runs again, perturbed, after its backward.

    The second call gets the first samples of the batch. What it logs is dropped, and metrics of torchmetrics do not
    count it; whatever else `training_step` does, it does twice, and it may draw other random numbers. Hooks around the
    backward are called for both.

    Args:
        epsilon: perturbation radius ε ≥ 0, as a fraction of the statistic; below 1 for a rule of signs.
        groups: ghost groups of the adversarial pass, as in `APART`.
        ratio: share of the samples in the adversarial pass.
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
        super().__init__(
            Settings(epsilon=epsilon, groups=groups, ratio=ratio, rule=rule, rows=rows, process_group=process_group)
        )

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Refuse what cannot work, before anything is set up."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise UsageError(
                "training_step takes its batches from a dataloader_iter, and TwoPassApart calls it twice for each. "
                "Give it (batch, batch_idx), or use OnePassApart."
            )

    def _around(
        self, trainer: "Trainer", pl_module: "LightningModule", apart: APART, backward: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        spares: dict[nn.Module, Any] = {}
        again, r = (), 0.5

        def proxy_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal again, r
            if trainer.fit_loop._skip_backward:
                return apart.model(*args, **kwargs)
            again, r = _adversarial_part(args, self._settings)
            return self._forward(apart, apart.to_proxy(), args, kwargs)

        def both_backwards(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self._open:
                done = backward(r * loss, *args, **kwargs)
            with apart.to_adver(), _aside(pl_module, spares):
                adversarial_loss = _loss_of(apart.model(*again))
                if adversarial_loss is None:
                    raise UsageError(
                        "training_step returned a loss for the clean batch, and none for the perturbed one. Return one "
                        "for both, or for none of them."
                    )
                backward((1 - r) * adversarial_loss / trainer.accumulate_grad_batches, *args, **kwargs)
            return done

        return proxy_forward, both_backwards


class _Step(nn.Module):
    """The training step of a strategy as the forward of a module, in which `APART` sees the whole batch."""

    def __init__(self, model: nn.Module | None, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = model, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _loss_of(output: Any) -> Any:
    """The loss in what `training_step` returned; None to skip the batch."""
    return output.get("loss") if isinstance(output, dict) else output


def _adversarial_part(batch: Any, settings: Settings) -> tuple[Any, float]:
    """The first N of M samples, and r = M / (M + N)."""
    if settings.ratio == 1:
        return batch, 0.5
    samples = batch_size(batch)
    chosen = adversarial_samples(samples, settings)
    return cut_batch(batch, 0, chosen), samples / (samples + chosen)


def _check(callback: _ApartCallback, trainer: Any, pl_module: "LightningModule") -> None:
    name = type(callback).__name__
    if not pl_module.automatic_optimization:
        raise UsageError(
            f"{type(pl_module).__name__} has automatic_optimization = False, and {name} works in Lightning's own "
            "optimisation. Set it to True; or drop the callback, and put APART's contexts around manual_backward()."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise UsageError(
            f"{type(trainer.strategy).__name__} accumulates and reduces gradients itself, which {name} was not made "
            "for. Use strategy='ddp' or 'auto'."
        )
    others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, _ApartCallback)]
    if len(others) > 1:
        raise UsageError(f"the trainer has {' and '.join(others)} among its callbacks. Keep one of them.")


def _gradients(model: nn.Module) -> list[tuple[nn.Parameter, Tensor | None, int]]:
    """Parameters, and what tells whether the gradient of one has changed."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    return [(parameter, grad, 0 if grad is None else grad._version) for parameter, grad in gradients]


def _check_gradients(before: list[tuple[nn.Parameter, Tensor | None, int]]) -> None:
    """Make sure that nothing was differentiated inside of `training_step`."""
    if any(
        parameter.grad is not grad or (grad is not None and grad._version != old) for parameter, grad, old in before
    ):
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
