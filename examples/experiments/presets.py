"""The published settings of the method, and what the bundled sets are trained with: `PRESETS`, one for every data set.

They are those of the original implementation's training scripts and of the commands in its README: WRN-40-2 on CIFAR,
preact ResNet-18 on Tiny-ImageNet, ResNet-18 on ImageNet; SGD with momentum 0.9 at a learning rate of 0.1, which falls
tenfold at the milestones. A last batch that is incomplete is always dropped, since groups must divide it. One pass was
not published, and `preset` gives it the rule that did best, and a radius that suits it.
"""

from __future__ import annotations

import os
from dataclasses import replace

from experiments.methods import OWN_RULES
from experiments.settings import (
    DataSettings,
    MachineSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainingSettings,
    as_json,
)

_CIFAR = Settings(
    data=DataSettings("cifar10"),
    model=ModelSettings("wideresnet40_2"),
    method=MethodSettings(epsilon=0.1, groups=16, rho=0.2),
    training=TrainingSettings(
        epochs=200, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="steps", milestones=(0.5, 0.75)
    ),
    machine=MachineSettings(workers=min(8, os.cpu_count() or 1)),
    seed=42,
)
_IMAGENET = replace(
    _CIFAR,
    data=DataSettings("imagenet", crop=224),
    model=ModelSettings("resnet18"),
    method=MethodSettings(epsilon=0.025, groups=1, rho=0.025),
    training=replace(
        _CIFAR.training,
        epochs=105,
        batch_size=256,
        weight_decay=1e-4,
        milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105),
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
    "mnist1d": replace(_BUNDLED, data=DataSettings("mnist1d"), model=ModelSettings("resnet1d")),
}


def preset(data: str, method: str | None = None, rule: str | None = None) -> Settings:
    """Where the settings of a run start from.

    Args:
        data: the data set.
        method: the method, if it is known.
        rule: the rule, if it is known.
    """
    settings = PRESETS.get(data, Settings())
    own = OWN_RULES.get(method or settings.method.name)
    if own is None or rule not in (None, own):
        return settings
    # Random signs want about twice the radius of the gradient's: examples/RESULTS.md
    return replace(settings, method=replace(settings.method, rule=own, epsilon=2 * settings.method.epsilon))


NAMES = {"data.name": "data", "data.folder": "data-dir", "model.name": "model", "method.name": "method"}  # in commands


def command_line(settings: Settings) -> list[str]:
    """The options of train that make these settings: those that differ from where its data set and method start."""
    options = ["--data", settings.data.name, "--method", settings.method.name]
    start, wanted = as_json(preset(settings.data.name, settings.method.name)), as_json(settings)
    for section, values in wanted.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        for name, value in pairs:
            path = f"{section}.{name}".rstrip(".")
            default = start[section][name] if name else start[section]
            if value == default or path in ("data.name", "method.name"):
                continue
            option = NAMES.get(path, (name or section).replace("_", "-"))
            if isinstance(value, bool):
                options.append(f"--{'' if value else 'no-'}{option}")
            else:
                options += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return options
