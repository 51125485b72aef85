"""APART in the `Trainer` of transformers: a subclass, which also mixes into subclasses of yours.

    OnePassTrainer(model, args, train_dataset=images, epsilon=0.2, groups=4).train()

    class Mine(OnePassTrainer, MyTrainer): ...

The contexts stand around `Trainer.training_step`, the forward and backward of one micro-batch; all else stays.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from apart_func import APART, UsageError
from apart_func.contexts import replaced
from apart_func.groups import Rows


class _ApartTrainer(Trainer):  # type: ignore[misc]  # mypy does not look into transformers
    """Keep the drop-in of the model that the `Trainer` trains.

    Arguments are those of the `Trainer`, and `epsilon`, `groups` and `rows` of `APART`; the groups must divide every
    micro-batch (`dataloader_drop_last=True`).

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
            raise UsageError(f"groups={groups} must divide every batch, also the last. Set dataloader_drop_last=True.")
        ranks: Any = "world" if self.args.world_size > 1 else None
        self.apart = APART(self.model, epsilon, groups, rows=rows, process_group=ranks)


class OnePassTrainer(_ApartTrainer):
    """Train in `APART(...).one_pass()`: half of the ghost groups are clean, the others are perturbed."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward and backward of a micro-batch."""
        self.apart.model = model  # in the wrappers that it is trained in
        with self.apart.one_pass():
            return super().training_step(model, *args, **kwargs)


class TwoPassTrainer(_ApartTrainer):
    """Train in `APART(...).to_proxy()` and `.to_adver()`, each loss with weight ½. The clean loss is logged."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forwards and backwards of a micro-batch."""
        self.apart.model, backward = model, self.accelerator.backward
        with replaced([(self.accelerator.__dict__, "backward", lambda loss, **options: backward(loss / 2, **options))]):
            with self.apart.to_proxy():
                loss = super().training_step(model, *args, **kwargs)
            with self.apart.to_adver():
                super().training_step(model, *args, **kwargs)
        return loss
