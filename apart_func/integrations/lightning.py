"""APART under Lightning's automatic optimization: a callback, and no change in the `LightningModule`.

    Trainer(callbacks=[OnePassApart(epsilon=0.2, groups=4)])         # costs what plain training costs
    Trainer(callbacks=[TwoPassApart(epsilon=0.1, groups=16)])        # calls training_step twice for every batch

`training_step` returns the plain loss, and each call of a network in it is a batch of its own, as in a loop by hand.
The callbacks replace `Strategy.training_step` and `Strategy.backward`: no hook of a callback runs before the forward if
an optimizer calls its closure again, and Lightning clears gradients between `training_step` and its own backward.
"""

import copy
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from apart_func import APART, BatchError, Settings, UsageError
from apart_func.contexts import gradient_versions, replaced
from apart_func.samples import batch_size, cut_batch
from apart_func.step import num_adversarial

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
else:  # Lightning has two names, whose classes do not mix: take the one that is imported already
    names = sorted(["lightning.pytorch", "pytorch_lightning"], key=lambda name: name not in sys.modules)
    found = [name for name in names if find_spec(name.split(".")[0])]
    if not found:
        raise ModuleNotFoundError("these callbacks need Lightning: pip install 'apart_func[lightning]'")
    Callback = import_module(found[0]).Callback

Passes = Generator[tuple[float, Any], None, None]


class _ApartCallback(Callback):
    """Run the forwards and backwards of the strategy in APART's contexts.

    Attributes:
        apart: the drop-in of the run, for `set_epsilon` and what it has found; None before training begins.
    """

    # Enter the context of each pass, and yield the weight of its loss and the arguments of `training_step`.
    _passes: Callable[[APART, "LightningModule", Any], Passes]

    def __init__(self, **settings: Any) -> None:
        APART(nn.BatchNorm1d(1), **settings)  # refuses what is out of range
        self.apart: APART | None = None
        self._settings = settings
        self._open: Passes | None = None  # the passes of a step, from its forward until its backward

    def setup(self, trainer: Any, pl_module: "LightningModule", stage: str) -> None:
        """Refuse what cannot work, before anything is set up."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            advice = "Set it to True, or put APART's contexts around manual_backward() without the callback"
            raise UsageError(f"{type(pl_module).__name__} has automatic_optimization = False. {advice}.")
        if trainer.strategy.handles_gradient_accumulation:
            raise UsageError(f"{type(trainer.strategy).__name__} accumulates gradients itself. Use strategy='ddp'.")
        if sum(isinstance(other, _ApartCallback) for other in trainer.callbacks) > 1:
            raise UsageError("the trainer has another callback of APART. Keep one of them.")
        if isinstance(self, TwoPassApart) and "dataloader_iter" in signature(pl_module.training_step).parameters:
            raise UsageError("training_step takes a dataloader_iter, and TwoPassApart needs (batch, batch_idx).")

    def on_train_start(self, trainer: Any, pl_module: "LightningModule") -> None:
        """Replace the strategy's forward and backward."""
        strategy = trainer.strategy
        plain_step, plain_backward = strategy.training_step, strategy.backward
        apart = self.apart = APART(trainer.model, **self._settings)
        weight = 1.0

        def training_step(*args: Any) -> Any:
            nonlocal weight
            if trainer.fit_loop._skip_backward:  # the last epoch of SWA, which only takes running statistics
                return plain_step(*args)
            before = gradient_versions(pl_module)
            self._open = self._passes(apart, pl_module, args)
            weight, args = next(self._open)
            output = plain_step(*args)
            if gradient_versions(pl_module) != before:
                problem = "training_step called backward(), and Lightning clears it: half of a gradient would be lost"
                raise UsageError(f"{problem}. Return the plain loss; the callback runs both passes.")
            if _loss_of(output) is None:  # Lightning skips this batch
                self._open.close()
            return output

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            plain_backward(weight * loss, *args, **kwargs)
            for second_weight, second_args in self._open or ():
                second_loss = _loss_of(plain_step(*second_args))
                if second_loss is None:
                    raise UsageError("training_step returned a loss for the clean batch, and none for the perturbed.")
                plain_backward(second_weight * second_loss / trainer.accumulate_grad_batches, *args, **kwargs)

        vars(strategy).update(training_step=training_step, backward=backward)

    def on_train_end(self, trainer: Any, pl_module: "LightningModule") -> None:
        for name in ("training_step", "backward"):
            vars(trainer.strategy).pop(name, None)

    def on_exception(self, trainer: Any, pl_module: "LightningModule", exception: BaseException) -> None:
        if self._open is not None:
            self._open.close()
        self.on_train_end(trainer, pl_module)


class OnePassApart(_ApartCallback):
    """Train in `APART(...).one_pass()`: a part of the ghost groups is clean, the others are perturbed.

    What `training_step` logs is of clean and perturbed samples together. Settings are those of `APART`, which has its
    `clean_fraction` in `one_pass()`; the `groups` must divide every batch (`drop_last=True`).
    """

    def __init__(self, epsilon: float | Tensor, groups: int, clean_fraction: float = 0.5, **settings: Any) -> None:
        super().__init__(epsilon=epsilon, groups=groups, **settings)
        self._clean_fraction = clean_fraction

    def _passes(self, apart: APART, pl_module: "LightningModule", args: Any) -> Passes:
        with apart.one_pass(self._clean_fraction):
            yield 1.0, args


class TwoPassApart(_ApartCallback):
    """Train in `APART(...).to_proxy()` and `.to_adver()`: `training_step` runs again, perturbed, after its backward.

    The second call gets the first samples of the batch, `ratio` of them (1 with several loaders). It logs nothing, and
    metrics of torchmetrics do not count it; whatever else `training_step` does, it does twice, and it may draw other
    random numbers. The other settings are those of `APART`.
    """

    def __init__(self, epsilon: float | Tensor = 0.1, groups: int = 0, ratio: float = 1.0, **settings: Any) -> None:
        super().__init__(epsilon=epsilon, groups=groups, **settings)
        self._sizes = Settings(groups=groups, ratio=ratio)
        self._spares: dict[int, Any] = {}  # metrics for the second call

    def _passes(self, apart: APART, pl_module: "LightningModule", args: Any) -> Passes:
        samples, chosen, batch = 1, 1, args[0]
        if self._sizes.ratio < 1:
            try:
                samples = batch_size(batch)
            except BatchError as error:
                raise BatchError(f"{error} With several loaders use ratio=1, or OnePassApart.") from error
            chosen = num_adversarial(samples, self._sizes)
            batch = cut_batch(batch, 0, chosen, samples)
        with apart.to_proxy():
            yield samples / (samples + chosen), args
        with apart.to_adver(), _unlogged(pl_module, self._spares):
            yield chosen / (samples + chosen), (batch, *args[1:])


def _unlogged(pl_module: "LightningModule", spares: dict[int, Any]) -> AbstractContextManager[None]:
    """Let `training_step` log nothing while open, and count in spare metrics."""
    from torchmetrics import Metric, MetricCollection  # it comes with Lightning

    replacements: list[Any] = [(vars(pl_module), "log", lambda *args, **kwargs: None)]
    for parent in [module for module in pl_module.modules() if not isinstance(module, (Metric, MetricCollection))]:
        for key, metric in parent._modules.items():
            if isinstance(metric, (Metric, MetricCollection)):
                if id(metric) not in spares:  # the hash of a metric changes with what it counts
                    spares[id(metric)] = copy.deepcopy(metric)
                spares[id(metric)].reset()
                replacements.append((parent._modules, key, spares[id(metric)]))
    return replaced(replacements)


def _loss_of(output: Any) -> Any:
    """The loss in what `training_step` returned; None to skip the batch."""
    return output.get("loss") if isinstance(output, dict) else output
