"""Two ranks over gloo: one perturbation for all of them, and the gradients of averaged shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loops import both_passes, gradients
from oracle import Shift, ShiftTree, oracle_adversarial, oracle_one_pass_step, oracle_proxy
from small import convolutional, images
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from apart_func import APART, StatGrads, make_apart_step, sign_perturbation, split_state
from apart_func.distributed import data_parallel_group, mean_over_ranks

RANKS, STEPS, LEARNING_RATE = 2, 3, 0.1
EPSILON, GROUPS, RATIO = 0.2, 2, 0.5
# Rounding of float64 in another order, and its growth over a few steps.
ROUNDING = {"rtol": 1e-10, "atol": 1e-14}


def shard(rank: int, t: int) -> tuple[Tensor, Tensor]:
    return images(seed=10 * t + rank)


# What runs on each rank.


def on_rank(rank: int, folder: Path) -> None:
    """Join the group, and save what every way of training yields."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        ways = {
            "wrapped": train_wrapped,
            "inner": train_inner,
            "functional": train_functional,
            "one_pass": train_one_pass,
            "accumulate": accumulate,
            "mean": mean,
        }
        results = {name: way(rank) for name, way in ways.items()}
    finally:
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


def train_wrapped(rank: int) -> list[dict[str, Any]]:
    """The four lines around a wrapped model, which is how people write it."""
    model = DistributedDataParallel(convolutional())
    assert data_parallel_group(nn.Sequential(model)) is model.process_group
    assert data_parallel_group(model.module) is None
    return steps(rank, model, APART(model, EPSILON, GROUPS))


def train_inner(rank: int) -> list[dict[str, Any]]:
    """The contexts around the module inside the wrapper, which has to be told of the group."""
    model = DistributedDataParallel(convolutional())
    return steps(rank, model, APART(model.module, EPSILON, GROUPS, process_group=dist.group.WORLD))


def steps(rank: int, model: DistributedDataParallel, apart: APART) -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    seen = []
    for t in range(STEPS):
        optimizer.zero_grad()
        both_passes(apart, shard(rank, t), RATIO, model=model)
        seen.append(
            {
                "grads": gradients(model.module),
                "perturbation": without_prefix(apart.perturbation),
                "stat_grads": without_prefix(apart.stat_grads),
                "buffers": {name: buffer.clone() for name, buffer in model.module.named_buffers()},
            }
        )
        optimizer.step()
    return seen


def train_functional(rank: int) -> list[dict[str, Any]]:
    """A rule that averages over ranks, and gradients that are averaged by hand."""

    def rule(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        return sign_perturbation(stats, mean_over_ranks(stat_grads), epsilon)

    model = convolutional()
    step = make_apart_step(model, F.cross_entropy, epsilon=EPSILON, groups=GROUPS, ratio=RATIO, rule=rule)
    params, buffers = split_state(model)
    seen = []
    for t in range(STEPS):
        out = step(params, buffers, shard(rank, t))
        for grad in out.grads.values():
            dist.all_reduce(grad)
            grad /= RANKS
        for buffer in out.buffers.values():
            dist.broadcast(buffer, 0)
        seen.append(
            {
                "grads": out.grads,
                "perturbation": without_prefix(out.perturbation),
                # of the loss with its weight, as the drop-in has them
                "stat_grads": {
                    k: Shift(*(g / (1 + RATIO) for g in v)) for k, v in mean_over_ranks(out.stat_grads).items()
                },
                "buffers": out.buffers,
            }
        )
        params = {name: p - LEARNING_RATE * out.grads[name] for name, p in params.items()}
        buffers = out.buffers
    return seen


def train_one_pass(rank: int) -> list[dict[str, Any]]:
    """One context around a wrapped model."""
    model = DistributedDataParallel(convolutional())
    apart = APART(model, EPSILON, GROUPS)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    seen = []
    for t in range(STEPS):
        x, y = shard(rank, t)
        before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        optimizer.zero_grad()
        with apart.one_pass():
            F.cross_entropy(model(x), y).backward()
        used = without_prefix(apart.perturbation)
        found = {name: Shift(*shift) for name, shift in without_prefix(apart.state_dict()["perturbation"]).items()}
        seen.append({"before": before, "grads": gradients(model.module), "used": used, "found": found})
        optimizer.step()
    return seen


def accumulate(rank: int) -> dict[str, Any]:
    """Two micro-batches, and one reduction of gradients, in the second adversarial pass."""
    model = DistributedDataParallel(convolutional())
    apart, perturbations = APART(model, EPSILON, GROUPS), []
    with model.no_sync():
        both_passes(apart, shard(rank, 0))
        perturbations.append(without_prefix(apart.perturbation))
        x, y = shard(rank, 1)
        with apart.to_proxy():
            (F.cross_entropy(model(x), y) / 2).backward()
    with apart.to_adver():
        (F.cross_entropy(model(x), y) / 2).backward()
    perturbations.append(without_prefix(apart.perturbation))
    return {"grads": gradients(model.module), "perturbations": perturbations}


def mean(rank: int) -> Any:
    own = {"a": StatGrads(torch.full((2,), 1.0 + rank), torch.arange(2.0)), "b": StatGrads(*torch.eye(2) * rank)}
    return mean_over_ranks(own)


def without_prefix(tree: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("module."): Shift(*value) for name, value in tree.items()}


# What is checked of it.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(on_rank, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def averaged(trees: list[Any]) -> Any:
    """The mean of dicts of tensors or of pairs of them."""
    if isinstance(trees[0], dict):
        return {name: averaged([tree[name] for tree in trees]) for name in trees[0]}
    return Shift(*map(averaged, zip(*trees, strict=True))) if isinstance(trees[0], tuple) else sum(trees) / len(trees)


def definition(model: nn.Module, shards: list[Any], perturbation: ShiftTree, ratio: float) -> dict[str, Any]:
    """A step on several ranks, written down: statistics of each shard, one perturbation, the mean of the gradients."""
    samples = len(shards[0][0])
    chosen = int(ratio * samples)
    r = samples / (samples + chosen)
    proxies = [oracle_proxy(model, F.cross_entropy, *shard) for shard in shards]
    adversarials = [
        oracle_adversarial(model, F.cross_entropy, x[:chosen], y[:chosen], perturbation, GROUPS) for x, y in shards
    ]
    first, second = (averaged([step.grads for step in passes]) for passes in (proxies, adversarials))
    return {
        "grads": {name: r * grad + (1 - r) * second[name] for name, grad in first.items()},
        # of the loss that backward() was called on
        "stat_grads": averaged([{k: Shift(r * g.mean, r * g.scale) for k, g in p.stat_grads.items()} for p in proxies]),
        "buffers": proxies[0].buffers,  # rank 0 broadcasts its own, as in plain training
    }


@pytest.mark.parametrize("way", ["wrapped", "inner", "functional"])
def test_gradients_and_perturbation_are_equal_on_all_ranks(ranks: list[dict[str, Any]], way: str) -> None:
    for first, second in zip(*(results[way] for results in ranks), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["wrapped", "inner", "functional"])
def test_every_step_is_that_of_the_definition_on_averaged_shards(ranks: list[dict[str, Any]], way: str) -> None:
    model = convolutional()
    for t, found in enumerate(ranks[0][way]):
        expected = definition(model, [shard(rank, t) for rank in range(RANKS)], found["perturbation"], RATIO)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, **ROUNDING)
        for layer, g in expected["stat_grads"].items():
            for shift, part in zip(found["perturbation"][layer], g, strict=True):
                clear = part.abs() > 1e-12  # where the sign is no matter of rounding
                assert torch.equal(shift[clear], EPSILON * part.sign()[clear])
        params = {name: p.detach() - LEARNING_RATE * found["grads"][name] for name, p in model.named_parameters()}
        model.load_state_dict(params | found["buffers"])


def test_one_pass_finds_one_perturbation_for_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for first, second in zip(*(results["one_pass"] for results in ranks), strict=True):
        for key in ("used", "found", "grads"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_one_pass_on_several_ranks_is_the_definition_on_averaged_shards(ranks: list[dict[str, Any]]) -> None:
    model = convolutional()
    for t, seen in enumerate(ranks[0]["one_pass"]):
        model.load_state_dict(seen["before"])
        steps = [
            oracle_one_pass_step(
                model, F.cross_entropy, shard(rank, t), seen["used"], epsilon=EPSILON, groups=GROUPS, clean=1
            )
            for rank in range(RANKS)
        ]
        torch.testing.assert_close(seen["grads"], averaged([step.grads for step in steps]), **ROUNDING)
        for layer, g in averaged([step.stat_grads for step in steps]).items():
            for shift, part in zip(seen["found"][layer], g, strict=True):
                clear = part.abs() > 1e-12  # where the sign is no matter of rounding
                assert torch.equal(shift[clear], EPSILON * part.sign()[clear])


def test_accumulation_without_synchronisation_still_has_one_perturbation_for_all_ranks(
    ranks: list[dict[str, Any]],
) -> None:
    first, second = (results["accumulate"] for results in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    parts = [
        definition(convolutional(), [shard(rank, t) for rank in range(RANKS)], perturbation, 1.0)["grads"]
        for t, perturbation in enumerate(first["perturbations"])
    ]
    total = {name: grad + parts[1][name] for name, grad in parts[0].items()}
    torch.testing.assert_close(first["grads"], total, **ROUNDING)


def test_the_mean_over_ranks_keeps_the_tree(ranks: list[dict[str, Any]]) -> None:
    expected = {"a": StatGrads(torch.full((2,), 1.5), torch.arange(2.0)), "b": StatGrads(*torch.eye(2) / 2)}
    for results in ranks:
        torch.testing.assert_close(results["mean"], expected, rtol=0, atol=0)
        assert type(results["mean"]["a"]) is StatGrads
