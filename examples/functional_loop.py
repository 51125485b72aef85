"""APART in a pure loop, on scikit-learn's digits: `python examples/functional_loop.py`.

    out = apart_step(params, buffers, batch)                                   values in, values out
    params, momenta = sgd(params, momenta, out.grads, lr)

The second loop below has an optimizer of `torch.optim` instead, which changes the model's own memory in place. Both end
with the same weights. TorchOpt maintains functional optimizers, see `docs/recipes/loops.md`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from apart_func import assign_grads_, functionalize, load_state_, make_one_pass_step, split_state

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


def sgd(params: Tensors, momenta: Tensors, grads: Tensors, lr: float) -> tuple[Tensors, Tensors]:
    """Take a step of SGD with momentum, and return the new parameters and momenta."""
    momenta = {name: MOMENTUM * momenta[name] + grads[name] + WEIGHT_DECAY * params[name] for name in params}
    return {name: params[name] - lr * momenta[name] for name in params}, momenta


def pure_loop(model: nn.Module, epochs: list[list[Batch]]) -> tuple[Tensors, Tensors]:
    """Train without changing any tensor, and return parameters and buffers."""
    apart_step = make_one_pass_step(model, F.cross_entropy, epsilon=0.2, groups=4)
    params, buffers = split_state(model)
    momenta = {name: torch.zeros_like(param) for name, param in params.items()}
    for epoch, batches in enumerate(epochs):
        lr = LR * (1 + math.cos(math.pi * epoch / len(epochs))) / 2
        for batch in batches:
            out = apart_step(params, buffers, batch)
            buffers = out.buffers
            params, momenta = sgd(params, momenta, out.grads, lr)
    return params, buffers


def in_place_loop(model: nn.Module, epochs: list[list[Batch]]) -> None:
    """Train the model's own memory, by an optimizer of `torch.optim`.

    `split_state` returns the model's own tensors. The optimizer changes them in place, which is how the next step sees
    new `params`: with a copy of them this loop would never train.
    """
    apart_step = make_one_pass_step(model, F.cross_entropy, epsilon=0.2, groups=4)
    params, buffers = split_state(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(epochs))
    for batches in epochs:
        for batch in batches:
            out = apart_step(params, buffers, batch)
            buffers = out.buffers
            assign_grads_(model, out.grads)
            optimizer.step()
        schedule.step()
    load_state_(model, params, buffers)  # the running statistics, back into the model


def digits() -> tuple[Batch, Batch]:
    """256 images of 8 × 8 to train on, and 1541 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images, labels, train_size=256, stratify=labels, random_state=0)
    mean, std = x.mean(), x.std()
    train, test = (torch.tensor((part - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8) for part in (x, test_x))
    return (train, torch.tensor(y)), (test, torch.tensor(test_y))


def shuffled(data: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of one size, in an order of the generator."""
    for indices in torch.randperm(len(data[0]), generator=generator).split(size):
        if len(indices) == size:
            yield data[0][indices], data[1][indices]


def network() -> nn.Sequential:
    """Three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main(epochs: int = 30, seed: int = 0) -> tuple[float, float]:
    """Train with both loops, and return their accuracies on the test images."""
    train, (test_x, test_y) = digits()
    torch.manual_seed(seed)
    initial, generator = network(), torch.Generator().manual_seed(seed)
    batches = [list(shuffled(train, 64, generator)) for _ in range(epochs)]

    model = copy.deepcopy(initial)
    torch.manual_seed(seed)  # of the random signs
    params, buffers = pure_loop(model, batches)
    scores = functionalize(model)(params, buffers, test_x, training=False)
    pure = (scores.argmax(dim=1) == test_y).double().mean().item()

    torch.manual_seed(seed)
    in_place_loop(model, batches)
    in_place = (model.eval()(test_x).argmax(dim=1) == test_y).double().mean().item()
    print(f"test accuracy: {pure:.2%} with values, {in_place:.2%} with torch.optim, of {len(test_y)} images")
    return pure, in_place


if __name__ == "__main__":
    main()
