"""Many networks trained at a time, in one program: `python examples/ensemble.py`.

    step    = make_apart_step(model, loss)                             one network, one batch
    members = vmap(step)                                               all networks, each with batch and radius
    torch.compile(members)                                             one program for all of them

The networks are small ResNets on scikit-learn's digits, of several seeds at each radius ε. A seed decides initial
weights and batches, so the networks of a seed differ by ε alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from experiments.datasets import evaluation_batches, load_dataset, training_batches
from experiments.resnets import small_resnet
from experiments.settings import DataSettings
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


def main(
    epsilons: tuple[float, ...] = (0.0, 0.1), seeds: int = 4, epochs: int = 60, compile: bool = True
) -> dict[float, list[float]]:
    """Train, and print the test errors.

    Args:
        epsilons: perturbation radii; ε = 0 is the control with two passes and no perturbation.
        seeds: networks at each radius.
        epochs: passes over the 256 training images.
        compile: make one program of all networks, which takes a minute.

    Returns:
        Test errors in percent, by radius.
    """
    digits = load_dataset(DataSettings("digits"))
    models = []
    for seed in [*range(seeds)] * len(epsilons):
        torch.manual_seed(seed)
        models.append(small_resnet(in_channels=1, classes=digits.classes))
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
        each = [training_batches(digits, batch_size=BATCH_SIZE, seed=seed, epoch=epoch) for seed in range(seeds)]
        for batches in zip(*each, strict=True):
            images, labels = (torch.stack(part * len(epsilons)) for part in zip(*batches, strict=True))
            members, _ = update(members, radii, images, labels, lr)
            first = first or time.perf_counter() - start
    print(f"{len(models)} networks, first step {first:.0f} s, all others {time.perf_counter() - start - first:.0f} s")

    fmodel = functionalize(models[0])
    (images, labels), *_ = evaluation_batches(digits, digits.test, batch_size=len(digits.test))
    with torch.no_grad():
        scores = vmap(lambda params, buffers: fmodel(params, buffers, images))(members.params, members.buffers)
    errors = 100 * (scores.argmax(dim=-1) != labels).double().mean(dim=1)
    found = dict(zip(epsilons, errors.view(len(epsilons), seeds).tolist(), strict=True))
    for epsilon, values in found.items():
        print(f"ε = {epsilon:g}: test error {sum(values) / seeds:.2f} %, mean of {seeds} seeds")
    return found


if __name__ == "__main__":
    tyro.cli(main)
