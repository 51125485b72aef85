"""APART in the `Trainer` of transformers: a subclass, which also mixes into subclasses of yours.

    OnePassTrainer(model, args, train_dataset=images, epsilon=0.2, groups=4).train()

    class Mine(OnePassTrainer, MyTrainer): ...

`Trainer.training_step` runs the forward and the backward of one micro-batch, and the contexts stand around it.
Evaluation, gradient accumulation, mixed precision, clipping and checkpoints stay as the `Trainer` does them.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from apart_func import APART, UsageError
from apart_func.groups import Rows


class _ApartTrainer(Trainer):  # type: ignore[misc]  # mypy does not look into transformers
    """Keep the drop-in of the model that the `Trainer` trains.

    Args:
        *args, **kwargs: those of the `Trainer`.
        epsilon: perturbation radius 0 ≤ ε < 1, as a fraction of the statistic.
        groups: ghost groups of a micro-batch; they must divide it (`dataloader_drop_last=True`).
        rows: how rows belong to samples, as in `APART`.

    Attributes:
        apart: the drop-in, for `set_epsilon` and what it has found.
    """

    def __init__(
        self, *args: Any, epsilon: float | Tensor, groups: int, rows: Rows | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UsageError("the Trainer would use nn.DataParallel. Start one process for each GPU, with torchrun.")
        if self.is_deepspeed_enabled:
            raise UsageError("DeepSpeed accumulates gradients itself, which APART does not support. Use DDP.")
        if groups not in (0, 1) and not self.args.dataloader_drop_last:
            problem = f"the last batch of an epoch may be shorter, and groups={groups} must divide every batch"
            raise UsageError(f"{problem}. Set dataloader_drop_last=True in TrainingArguments.")
        ranks: Any = "world" if self.args.world_size > 1 else None
        self.apart = APART(self.model, epsilon, groups, rows=rows, process_group=ranks)

    def _apart_of(self, model: nn.Module) -> APART:
        """Return the drop-in, of the model in the wrappers that it is trained in."""
        self.apart.model = model
        return self.apart


class OnePassTrainer(_ApartTrainer):
    """Train in `APART(...).one_pass()`: half of the ghost groups are clean, the others are perturbed."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward and backward of a micro-batch."""
        with self._apart_of(model).one_pass():
            return super().training_step(model, *args, **kwargs)


class TwoPassTrainer(_ApartTrainer):
    """Train in `APART(...).to_proxy()` and `.to_adver()`, each loss with weight ½. The clean loss is logged."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forwards and backwards of a micro-batch."""
        apart, accelerator = self._apart_of(model), self.accelerator
        backward = accelerator.backward
        accelerator.backward = lambda loss, **options: backward(0.5 * loss, **options)
        try:
            with apart.to_proxy():
                loss = super().training_step(model, *args, **kwargs)
            with apart.to_adver():
                super().training_step(model, *args, **kwargs)
        finally:
            del accelerator.backward  # the class has the one from before
        return loss
