"""The settings of a run, as frozen dataclasses: the command line sets them, and `config.json` keeps them.

    data      which samples          training   optimizer, schedule, precision
    model     which network          machine    what may change when a run is resumed: it decides no result
    method    plain, apart, ...      seed, out

`PRESETS` are the published settings of each data set. `--help` prints the comment of every option, and a value out of
range raises a `SettingsError`.
"""

from __future__ import annotations

import json
import math
import os
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

METHODS: tuple[str, ...] = get_args(MethodName)

# The forward-backward passes of a step, in their order.
PASSES: dict[str, tuple[str, ...]] = {
    "plain": ("training",),
    "apart": ("proxy", "adversarial"),
    "one_pass": ("training",),
    "apart_sam": ("proxy", "adversarial"),
    "sam": ("first", "second"),
    "ghost_noise": ("training",),
}
# The methods that read a setting, where not all do.
APART_METHODS = ("apart", "one_pass", "apart_sam")
READ_BY: dict[str, tuple[str, ...]] = {
    "method.epsilon": APART_METHODS,
    "method.rule": APART_METHODS,
    "method.groups": APART_METHODS,
    "method.ratio": ("apart", "apart_sam"),
    "method.clean_fraction": ("one_pass",),
    "method.rho": ("apart_sam", "sam"),
    "method.ghost_size": ("ghost_noise",),
}
OWN_RULES: dict[str, RuleName] = {"one_pass": "random_sign"}  # of methods whose default is not that of `MethodSettings`

# Options of earlier versions, with the value that changed nothing (... is any): a run that has it can still be read.
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
        if self.name not in METHODS:
            raise SettingsError(f"there is no method {self.name!r}: choose one of {', '.join(METHODS)}.")
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


def differences(settings: Settings, stored: Settings) -> str:
    """Where two runs differ in what decides their result: a line for each setting, nothing if there is none."""
    ours, theirs = decisive(settings), decisive(stored)
    return "".join(f"\n  {name}: {ours[name]}, stored {theirs[name]}" for name in ours if ours[name] != theirs[name])


def decisive(settings: Settings) -> dict[str, Any]:
    """What decides the result of a run, as `section.name`; all else may change when it is resumed."""
    return {name: value for name, value in _flat(settings).items() if name != "data.folder"}


def compared(settings: Settings) -> dict[str, Any]:
    """What sets the rows of a table apart: without split and seed, and without what the method does not read."""
    left_out = {"data.split_seed", "seed"}
    if settings.data.name != "folder":  # elsewhere the name says what lies there
        left_out.add("data.folder")
    is_read = {name: settings.method.name in methods for name, methods in READ_BY.items()}
    return {name: v for name, v in _flat(settings).items() if name not in left_out and is_read.get(name, True)}


def _flat(settings: Settings) -> dict[str, Any]:
    """All but machine and out, by `section.name`."""
    sections = {name: part for name, part in as_json(settings).items() if name not in ("machine", "seed", "out")}
    flat = {f"{section}.{name}": value for section, part in sections.items() for name, value in part.items()}
    return {**flat, "seed": settings.seed}


def learning_rate(training: TrainingSettings, done: float) -> float:
    """The learning rate where a share `done` of the run's steps lies behind."""
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * done)) / 2
    return training.lr * training.gamma ** sum(done >= milestone for milestone in training.milestones)


def passes_per_epoch(settings: Settings) -> float:
    """Forward-backward passes over the training data in an epoch: what a method costs."""
    method = settings.method
    return len(PASSES[method.name]) - 1 + (method.ratio if method.name in READ_BY["method.ratio"] else 1)


_CIFAR = Settings(
    data=DataSettings("cifar10"),
    model=ModelSettings("wideresnet40_2"),
    method=MethodSettings(epsilon=0.1, groups=16, rho=0.2),
    training=TrainingSettings(epochs=200, batch_size=128, weight_decay=5e-4, milestones=(0.5, 0.75)),
    machine=MachineSettings(workers=min(8, os.cpu_count() or 1)),
    seed=42,
)
_IMAGENET = replace(
    _CIFAR,
    data=DataSettings("imagenet", crop=224),
    model=ModelSettings("resnet18"),
    method=MethodSettings(epsilon=0.025, groups=1, rho=0.025),
    training=TrainingSettings(
        epochs=105, batch_size=256, weight_decay=1e-4, milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105)
    ),
)
_BUNDLED = Settings(
    method=MethodSettings(groups=4),
    training=TrainingSettings(epochs=60, batch_size=64, schedule="cosine"),
    machine=MachineSettings(checkpoint_epochs=0, checkpoint_seconds=30),
)
PRESETS: dict[str, Settings] = {
    "cifar10": _CIFAR,
    "cifar100": replace(_CIFAR, data=DataSettings("cifar100")),
    "tiny-imagenet": replace(
        _CIFAR,
        data=DataSettings("tiny-imagenet", crop=64),
        model=ModelSettings("preact_resnet18"),
        method=replace(_CIFAR.method, groups=8),
        training=replace(_CIFAR.training, batch_size=256),
    ),
    "imagenet": _IMAGENET,
    "folder": replace(_IMAGENET, data=DataSettings("folder", crop=224)),
    "digits": _BUNDLED,
    "mnist5k": replace(_BUNDLED, data=DataSettings("mnist5k")),
}


def preset(data: str, method: str | None = None, rule: str | None = None) -> Settings:
    """Where the settings of a run start from, given what is known of it."""
    settings = PRESETS.get(data, Settings())
    own = OWN_RULES.get(method or settings.method.name)
    if own is None or rule not in (None, own):
        return settings
    # Random signs want about twice the radius of the gradient's: examples/RESULTS.md
    return replace(settings, method=replace(settings.method, rule=own, epsilon=2 * settings.method.epsilon))
