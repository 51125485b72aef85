"""Many networks trained at a time, in one program: `python examples/ensemble.py`.

    step    = make_apart_step(model, loss)                             one network, one batch
    members = vmap(step)                                               all networks, each with batch and radius
    torch.compile(members)                                             one program for all of them

The networks learn scikit-learn's digits, from several seeds at each radius ε. A seed decides initial weights and
batches, so the networks of one seed differ by ε alone.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from apart_func import functionalize, make_apart_step

Tensors = dict[str, Tensor]
LR, MOMENTUM, WEIGHT_DECAY, BATCH_SIZE, GROUPS = 0.1, 0.9, 5e-4, 64, 4


class Members(NamedTuple):
    """The state of all networks, in stacked tensors: entry i belongs to network i.

    Attributes:
        params: trained tensors by name.
        buffers: all others.
        momenta: of SGD, keyed as `params`.
    """

    params: Tensors
    buffers: Tensors
    momenta: Tensors


Update = Callable[[Members, Tensor, Tensor, Tensor, Tensor], tuple[Members, Tensor]]


def make_update(model: nn.Module) -> Update:
    """The training step of all networks at once: APART's gradients under vmap, and SGD with momentum.

    Args:
        model: a network of their architecture.

    Returns:
        A pure function of members, their radii, images (members, batch, ...), labels and a learning rate, to new
        members and their losses.
    """
    apart_step = make_apart_step(model, F.cross_entropy, groups=GROUPS)

    def one(
        params: Tensors, buffers: Tensors, images: Tensor, labels: Tensor, epsilon: Tensor
    ) -> tuple[Tensors, Tensors, Tensor]:
        out = apart_step(params, buffers, (images, labels), epsilon=epsilon)
        return out.grads, out.buffers, out.loss

    def update(
        members: Members, epsilons: Tensor, images: Tensor, labels: Tensor, lr: Tensor
    ) -> tuple[Members, Tensor]:
        grads, buffers, losses = vmap(one)(members.params, members.buffers, images, labels, epsilons)
        momenta = {
            name: MOMENTUM * members.momenta[name] + grads[name] + WEIGHT_DECAY * param
            for name, param in members.params.items()
        }
        params = {name: param - lr * momenta[name] for name, param in members.params.items()}
        return Members(params, buffers, momenta), losses

    return update


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """256 images of 8 × 8 to train on, and 1541 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images, labels, train_size=256, stratify=labels, random_state=0)
    mean, std = x.mean(), x.std()
    train, test = (torch.tensor((part - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8) for part in (x, test_x))
    return (train, torch.tensor(y)), (test, torch.tensor(test_y))


def network(seed: int) -> nn.Sequential:
    """Three convolutions with batch norm."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main(
    epsilons: tuple[float, ...] = (0.0, 0.1), seeds: int = 4, epochs: int = 30, compile: bool = False
) -> dict[float, list[float]]:
    """Train, print the test errors, and return them in percent by radius; ε = 0 has two passes and no perturbation."""
    (train_x, train_y), (test_x, test_y) = digits()
    models = [network(seed) for seed in [*range(seeds)] * len(epsilons)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    params, buffers = stack_module_state(models)
    params = {name: param.detach() for name, param in params.items()}
    members = Members(params, buffers, {name: torch.zeros_like(param) for name, param in params.items()})
    radii = torch.tensor(epsilons).repeat_interleave(seeds)
    update = make_update(models[0])
    if compile:
        update = torch.compile(update, fullgraph=True, dynamic=False)

    start, first = time.perf_counter(), 0.0
    for epoch in range(epochs):
        lr = torch.tensor(LR * (1 + math.cos(math.pi * epoch / epochs)) / 2)
        orders = [torch.randperm(len(train_x), generator=generator) for generator in generators]
        for indices in torch.stack(orders * len(epsilons)).split(BATCH_SIZE, dim=1):
            members, _ = update(members, radii, train_x[indices], train_y[indices], lr)
            first = first or time.perf_counter() - start
    print(f"{len(models)} networks, first step {first:.0f} s, all others {time.perf_counter() - start - first:.0f} s")

    fmodel = functionalize(models[0])
    with torch.no_grad():
        scores = vmap(lambda params, buffers: fmodel(params, buffers, test_x))(members.params, members.buffers)
    errors = 100 * (scores.argmax(dim=-1) != test_y).double().mean(dim=1)
    found = dict(zip(epsilons, errors.view(len(epsilons), seeds).tolist(), strict=True))
    for epsilon, values in found.items():
        print(f"ε = {epsilon:g}: test error {sum(values) / seeds:.2f} %, mean of {seeds} seeds")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="make one program of all networks, which takes a minute")
    main(compile=parser.parse_args().compile)
