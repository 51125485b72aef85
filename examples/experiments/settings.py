"""Everything that decides a training run, as frozen dataclasses: what the command line sets and `config.json` keeps.

data      which samples          training   optimizer, schedule, precision
model     which network          machine    what a run may change when it is resumed: it decides no result
method    plain, apart, ...      seed, out

`--help` prints the comment of every option. Whoever asks for something out of range gets a `SettingsError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import dacite
from tyro.conf import arg

DataName = Literal["cifar10", "cifar100", "tiny-imagenet", "imagenet", "folder", "digits", "mnist5k"]
MethodName = Literal["plain", "apart", "one_pass", "apart_sam", "sam", "ghost_noise"]
RuleName = Literal["sign", "random_sign", "l2"]
Number = Annotated[int | None, arg(metavar="N")]
Pixels = Annotated[int | None, arg(metavar="PIXELS")]

# Options that are no more, with the value at which they changed nothing (... for any): runs that have it can be read.
GONE: dict[str, dict[str, Any]] = {
    "method": {"carry": "clean", "epsilon_schedule": "constant", "every": 1, "norm": "linf", "remainder": "error"}
    | {"ascent_steps": 3, "microbatches": 1},
    "machine": {"log_steps": ..., "tensorboard": ...},
}


class SettingsError(ValueError):
    """A setting is out of range, or stored settings cannot be used."""


def _check(low: float, below: float = math.inf, **values: float | None) -> None:
    expected = f"a finite number ≥ {low}" if below == math.inf else f"a share from {low} to below {below}"
    for name, value in values.items():
        if value is not None and not low <= value < below:
            raise SettingsError(f"{name} is {value}; expected {expected}.")


@dataclass(frozen=True)
class DataSettings:
    """What is trained on."""

    # the data set. digits and mnist5k come with Python packages.
    name: Annotated[DataName, arg(name="data")] = "digits"
    # where it lies on disk; the bundled sets need none.
    folder: Annotated[Path | None, arg(name="data-dir", metavar="PATH")] = None
    crop: Pixels = None  # side of the images that the network sees; by default that of the data set.
    # side to which CIFAR's images are enlarged for a network that was pretrained on larger ones; then
    # pixels lie in [−1, 1], as such networks expect.
    resize: Pixels = None
    augment: bool = True  # crop and flip the training images at random, where the data set has it.
    # how many to train on, with the same share of every class; by default all that are left.
    train_samples: Number = None
    # how many to set aside from the training samples for choosing settings, likewise; by default the number of the
    # bundled sets, and none of the others.
    validation_samples: Number = None
    test_samples: Number = None  # how many of the test samples to measure on, the first; by default all.
    split_seed: int = 0  # decides which samples are trained on and set aside.

    def __post_init__(self) -> None:
        _check(0, split_seed=self.split_seed, validation_samples=self.validation_samples)
        _check(1, train_samples=self.train_samples, test_samples=self.test_samples, resize=self.resize)


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    # small_resnet, mnist_resnet, cifar_resnet, wideresnet16_2, wideresnet40_1, wideresnet40_2, wideresnet28_10,
    # preact_resnet18, any ResNet of torchvision, or any network of timm; efficientnet_lite0_imagenet is pretrained.
    name: Annotated[str, arg(name="model")] = "small_resnet"
    width: Annotated[int | None, arg(metavar="CHANNELS")] = None  # channels of its first stage, where it has a choice.
    dropout: float = 0.0  # share of the features that training drops before the classifier.

    def __post_init__(self) -> None:
        _check(0, 1, dropout=self.dropout)


@dataclass(frozen=True)
class MethodSettings:
    """What a training step computes."""

    # one forward and backward (plain, one_pass, ghost_noise), or two (apart, apart_sam, sam).
    name: Annotated[MethodName, arg(name="method")] = "apart"
    # APART's perturbation radius, as a fraction of the statistic. At 0 the second pass is a control.
    epsilon: float = 0.1
    # which way APART moves the statistics: by the sign of their gradient, at random, or along the gradient. Where none
    # is said, one pass takes random signs.
    rule: RuleName = "sign"
    # APART's ghost groups in the adversarial pass, or of the whole batch in one pass. 0 makes one group.
    groups: int = 16
    clean_fraction: float = 0.5  # share of the groups that are clean in one pass.
    ratio: float = 1.0  # share of the batch that goes through APART's adversarial pass.
    rho: float = 0.1  # radius of the weight perturbation of APART-SAM and SAM.
    ghost_size: int = 8  # samples in a random ghost group of ghost noise.
    label_smoothing: float = 0.0  # share of a label that is spread over all classes.

    def __post_init__(self) -> None:
        if self.name not in get_args(MethodName):
            raise SettingsError(f"there is no method {self.name!r}: choose one of {', '.join(get_args(MethodName))}.")
        _check(0, epsilon=self.epsilon, rho=self.rho)
        _check(2, ghost_size=self.ghost_size)
        _check(0, 1, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained: SGD with momentum."""

    epochs: int = 200  # passes over the training samples.
    # samples in a batch, of all processes together; an incomplete last batch of an epoch is dropped.
    batch_size: int = 128
    lr: float = 0.1  # learning rate at the start.
    momentum: float = 0.9  # of SGD.
    nesterov: bool = False  # look ahead along the momentum, as SGD of torch does.
    weight_decay: float = 5e-4  # of SGD, on all parameters.
    schedule: Literal["steps", "cosine"] = "steps"  # the learning rate falls in steps, or to zero along a cosine.
    # where the schedule of steps multiplies it by gamma, as fractions of the run.
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1  # that factor.
    # under torchrun, statistics of batch norm over all processes; auto does so on GPUs.
    sync_batch_norm: Literal["auto", "on", "off"] = "auto"
    # lower precision of activations. Weights stay float32.
    amp: Annotated[Literal["bf16"] | None, arg(metavar="{bf16}")] = None
    compile: bool = False  # make one graph of the whole step with torch.compile.
    # largest norm of the gradient; a longer one is shortened to it.
    clip: Annotated[float | None, arg(metavar="NORM")] = None
    channels_last: bool = False  # memory order of images that tensor cores prefer.
    evaluate_every: int = 1  # epochs from one evaluation to the next; the last epoch is always evaluated.

    def __post_init__(self) -> None:
        _check(1, epochs=self.epochs, batch_size=self.batch_size, evaluate_every=self.evaluate_every)
        _check(0, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, gamma=self.gamma)
        if self.nesterov and not self.momentum:
            raise SettingsError("nesterov looks ahead along a momentum, which is 0: leave it out, or raise --momentum.")
        if sorted(self.milestones) != list(self.milestones) or not all(0 < share < 1 for share in self.milestones):
            raise SettingsError(f"milestones are {self.milestones}; expected rising fractions of the run, in (0, 1).")
        if self.clip is not None and not self.clip > 0:
            raise SettingsError(f"clip is {self.clip}; expected a norm above 0.")


@dataclass(frozen=True)
class MachineSettings:
    """What a run may change when it is resumed."""

    device: str = "auto"  # cpu, cuda, cuda:1 and so on; auto takes a GPU if there is one.
    # refuse operations that differ from call to call on a GPU, so that a resumed run is exact there.
    deterministic: bool = False
    workers: int = 0  # processes that load and augment, on each machine.
    checkpoint_epochs: int = 1  # epochs from one checkpoint to the next; 0 leaves it to the time.
    checkpoint_seconds: float = 600.0  # longest time without a checkpoint, also within an epoch.

    def __post_init__(self) -> None:
        _check(0, workers=self.workers, checkpoint_epochs=self.checkpoint_epochs)
        _check(0, checkpoint_seconds=self.checkpoint_seconds)


@dataclass(frozen=True)
class Settings:
    """A training run."""

    data: DataSettings = field(default_factory=DataSettings)  # what is trained on.
    model: ModelSettings = field(default_factory=ModelSettings)  # the network.
    method: MethodSettings = field(default_factory=MethodSettings)  # what a step computes.
    training: TrainingSettings = field(default_factory=TrainingSettings)  # how the network is trained.
    machine: MachineSettings = field(default_factory=MachineSettings)  # what a run may change when it is resumed.
    seed: int = 0  # of the initial weights, the batches and their augmentation.
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/train")  # folder of the run.

    def __post_init__(self) -> None:
        _check(0, seed=self.seed)
        for name, folder in {"--out": self.out, "--data-dir": self.data.folder}.items():
            try:
                str(folder).encode()
            except UnicodeEncodeError:
                raise SettingsError(f"{name} {str(folder)!a} is not valid UTF-8: rename the folder.") from None


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, nested as they are."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain


def from_json(stored: Any) -> Settings:
    """Settings from what `as_json` made of them."""
    if not isinstance(stored, Mapping):
        raise SettingsError(f"the stored settings are a {type(stored).__name__}; expected an object of sections.")
    given = {name: value for name, value in stored.items() if name in {part.name for part in fields(Settings)}}
    for name, gone in GONE.items():
        if isinstance(given.get(name), Mapping):
            given[name] = {key: v for key, v in given[name].items() if key not in gone or gone[key] not in (v, ...)}
    try:
        return dacite.from_dict(Settings, given, dacite.Config(cast=[Path, tuple, float], strict=True))
    except dacite.DaciteError as error:
        raise SettingsError(f"the stored settings do not fit this version of the program: {error}.") from error


def differences(settings: Settings, stored: Settings) -> list[str]:
    """Where two runs differ in what decides their result."""
    ours, theirs = (_flat(as_json(decisive_only(each))) for each in (settings, stored))
    return [f"{name}: {ours[name]}, stored {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def decisive_only(settings: Settings) -> Settings:
    """The settings, with everything that may change when a run is resumed at its default."""
    default = Settings()
    return replace(settings, data=replace(settings.data, folder=None), machine=default.machine, out=default.out)


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in nested.items()}
    return {f"{part}.{name}".rstrip("."): value for part, values in parts.items() for name, value in values.items()}
