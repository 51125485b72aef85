"""Two and four ranks over gloo, which take one step together.

With SyncBatchNorm they are one process on the whole batch; without it they are the definition on averaged shards.
Everything that ranks do is done in three worlds, since to start one takes seconds: every rank saves what it has found,
and the tests look at that.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loops import both_passes, gradients, in_one_pass
from oracle import Shift, ShiftTree, oracle_adversarial, oracle_one_pass_step, oracle_proxy
from small import Parts, convolutional, images
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from apart_func import (
    APART,
    ApartError,
    RanksError,
    SettingError,
    StatGrads,
    functionalize,
    init_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    random_sign_perturbation,
    sign_perturbation,
    split_state,
)
from apart_func.ranks import data_parallel_group, mean_over_ranks

RANKS, STEPS, LEARNING_RATE = 2, 3, 0.1
EPSILON, GROUPS, RATIO = 0.2, 2, 0.5
# Rounding of float64 in another order, and its growth over a few steps.
ROUNDING = {"rtol": 1e-10, "atol": 1e-14}


Results = list[dict[str, Any]]  # of the ranks, or of a rank's steps
TOGETHER: dict[str, Any] = {"epsilon": EPSILON, "groups": GROUPS, "process_group": "world"}


def shard(rank: int, t: int = 0) -> tuple[Tensor, Tensor]:
    return images(seed=10 * t + rank)


def step_of(rank: int, make: Any = make_apart_step, model: nn.Module | None = None, **options: Any) -> Any:
    model = model or convolutional()
    step = make(model, F.cross_entropy, **(TOGETHER | options))
    torch.manual_seed(rank)  # after the model, which is made from a seed of its own
    return step(*split_state(model), shard(rank))


# What runs on each rank.


@contextmanager
def world(rank: int, folder: Path, ranks: int) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    yield
    dist.destroy_process_group()


Way = Callable[[int], Any]
WAYS: dict[int, dict[str, Way]] = {RANKS: {}, 4: {}}  # by the number of ranks


def way(*worlds: int) -> Callable[[Way], Way]:
    """Have a function of the rank called in worlds of so many ranks, and its result saved under its name."""

    def register(function: Way) -> Way:
        for ranks in worlds or (RANKS,):
            WAYS[ranks][function.__name__] = function
        return function

    return register


def on_rank(rank: int, folder: Path, ranks: int) -> None:
    """Join the group, and save what every way of training yields."""
    with world(rank, folder, ranks):
        torch.save({name: found(rank) for name, found in WAYS[ranks].items()}, folder / f"{rank}.pt")


# Two ways to train; what happens in a step is read where it is yielded.

Batches = Callable[[int], tuple[Tensor, Tensor]]


def descent(make: Any, model: nn.Module, batch_of: Batches, steps: int = STEPS, *carried: Any, **options: Any) -> Any:
    """Steps of a functional form with plain descent between them: yields each output, and the parameters after it."""
    step, (params, buffers) = make(model, F.cross_entropy, **(TOGETHER | options)), split_state(model)
    for t in range(steps):
        out = step(params, buffers, batch_of(t), *carried)
        params = {name: p - LEARNING_RATE * out.grads[name] for name, p in params.items()}
        buffers, carried = out.buffers, (out.perturbation,) if carried else ()
        yield out, params


def loop(model: nn.Module, batch_of: Batches, backward: Callable[[Any], Any], steps: int = STEPS) -> Iterator[int]:
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for t in range(steps):
        optimizer.zero_grad()
        backward(batch_of(t))
        yield t
        optimizer.step()


# The definition on averaged shards.


@way()
def wrapped(rank: int) -> Results:
    """The four lines around a wrapped model, which is how people write it."""
    model = DistributedDataParallel(convolutional())
    assert data_parallel_group(nn.Sequential(model)) is model.process_group
    assert data_parallel_group(model.module) is None
    return recorded(rank, model, APART(model, EPSILON, GROUPS))


@way()
def inner(rank: int) -> Results:
    """The contexts around the module inside the wrapper, which has to be told of the group."""
    model = DistributedDataParallel(convolutional())
    return recorded(rank, model, APART(model.module, EPSILON, GROUPS, process_group=dist.group.WORLD))


def recorded(rank: int, model: DistributedDataParallel, apart: APART) -> Results:
    return [
        {
            "grads": gradients(model.module),
            "perturbation": without_prefix(apart.perturbation),
            "stat_grads": without_prefix(apart.stat_grads),
            "buffers": {name: buffer.clone() for name, buffer in model.module.named_buffers()},
        }
        for _ in loop(model, partial(shard, rank), lambda batch: both_passes(apart, batch, RATIO, model=model))
    ]


@way(RANKS, 4)
def functional(rank: int) -> Results:
    """The functional step, which reduces everything itself."""
    return [
        {
            "grads": out.grads,
            "perturbation": without_prefix(out.perturbation),
            # of the loss with its weight, as the drop-in has them
            "stat_grads": {k: Shift(*(g / (1 + RATIO) for g in v)) for k, v in out.stat_grads.items()},
            "buffers": out.buffers,
            "loss": out.loss,
        }
        for out, _ in descent(make_apart_step, convolutional(), partial(shard, rank), ratio=RATIO)
    ]


@way()
def by_rule(rank: int) -> Any:
    """A rule that averages over ranks itself, in a step that reduces nothing."""

    def rule(stats: Any, stat_grads: Any, epsilon: Tensor) -> Any:
        return sign_perturbation(stats, mean_over_ranks(stat_grads), epsilon)

    return step_of(rank, rule=rule, process_group=None).perturbation


@way()
def wrapped_one_pass(rank: int) -> Results:
    """One context around a wrapped model, from generators that differ."""
    model = DistributedDataParallel(convolutional())
    apart, before = APART(model, EPSILON, GROUPS), dict[str, Tensor]()

    def backward(batch: tuple[Tensor, Tensor]) -> None:
        before.update({name: tensor.clone() for name, tensor in model.module.state_dict().items()})
        in_one_pass(apart, batch)

    torch.manual_seed(rank)
    return [
        {"before": dict(before), "grads": gradients(model.module), "perturbation": without_prefix(apart.perturbation)}
        for _ in loop(model, partial(shard, rank), backward)
    ]


@way()
def accumulated(rank: int) -> dict[str, Any]:
    """Two micro-batches, and one reduction of gradients, in the second adversarial pass."""
    model = DistributedDataParallel(convolutional())
    apart, perturbations = APART(model, EPSILON, GROUPS), []
    with model.no_sync():
        both_passes(apart, shard(rank))
        perturbations.append(without_prefix(apart.perturbation))
        x, y = shard(rank, 1)
        with apart.to_proxy():
            (F.cross_entropy(model(x), y) / 2).backward()
    with apart.to_adver():
        (F.cross_entropy(model(x), y) / 2).backward()
    perturbations.append(without_prefix(apart.perturbation))
    return {"grads": gradients(model.module), "perturbations": perturbations}


@way()
def mean(rank: int) -> Any:
    own = {"a": StatGrads(torch.full((2,), 1.0 + rank), torch.arange(2.0)), "b": StatGrads(*torch.eye(2) * rank)}
    return mean_over_ranks(own)


# Training that several ranks and one process are to do alike. What differs is where a batch comes from.

SETTINGS = list(product((1.0, 0.5), (0, 2)))
LONG = 5


def synchronised(group: Any = None) -> nn.Module:
    model: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(convolutional(), group)
    return model


def whole_batch(t: int, ranks: int, chosen: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks, beginning with the samples that each rank's adversarial pass takes.

    Shards hold a multiple of the ghost groups, so a sample is in one and the same group here and there.
    """
    shards = [shard(rank, t) for rank in range(ranks)]
    first, rest = ([tuple(part[cut] for part in one) for one in shards] for cut in (slice(chosen), slice(chosen, None)))
    x, y = (torch.cat(parts) for parts in zip(*first, *rest, strict=True))
    return x, y


def last_of(steps: Any) -> Any:
    *_, (out, params) = steps
    return params, out.buffers, out.loss, out.adversarial_loss, out.stats, out.stat_grads, out.perturbation


def one_pass(model: nn.Module, batch_of: Batches, steps: int, group: Any) -> Any:
    more = {"rule": sign_perturbation, "process_group": group}
    return last_of(descent(make_one_pass_step, model, batch_of, steps, init_perturbation(model), **more))


def drop_in(batch_of: Batches, group: Any, ratio: float, groups: int, in_one: bool = False) -> Any:
    """The drop-in; DistributedDataParallel takes SyncBatchNorm on GPUs alone, so gradients are averaged by hand."""
    model = synchronised()
    apart = APART(model, EPSILON, groups, process_group=group)
    backward = partial(in_one_pass, apart) if in_one else lambda batch: both_passes(apart, batch, ratio)
    for _ in loop(model, batch_of, backward, LONG):
        for parameter in model.parameters() if group == "world" else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return state, apart.stats, apart.stat_grads, apart.perturbation


def all_forms(batches: Callable[[int], Batches], group: Any) -> dict[str, Any]:
    """Every form with every setting; `batches` of how many samples a rank's adversarial pass takes."""
    found = {
        "one pass": one_pass(synchronised(), batches(8), LONG, group),
        "one-pass drop-in": drop_in(batches(8), group, 1.0, GROUPS, in_one=True),
    }
    for ratio, groups in SETTINGS:
        of_ratio = batches(int(8 * ratio))
        options = {"ratio": ratio, "groups": groups, "process_group": group}
        found[f"two passes {ratio} {groups}"] = last_of(
            descent(make_apart_step, synchronised(), of_ratio, LONG, **options)
        )
        found[f"drop-in {ratio} {groups}"] = drop_in(of_ratio, group, ratio, groups)
    return found


FORMS = ["one pass", "one-pass drop-in"]
FORMS += [f"{form} {ratio} {groups}" for form in ("two passes", "drop-in") for ratio, groups in SETTINGS]


@way(RANKS, 4)
def all_synchronised(rank: int) -> dict[str, Any]:
    return all_forms(lambda chosen: partial(shard, rank), "world")


@way(RANKS, 4)
def long(rank: int) -> Any:
    """Fifty steps of either form in float32, without SyncBatchNorm."""

    def batch_of(t: int) -> tuple[Tensor, Tensor]:
        return images(dtype=torch.float32, seed=10 * t + rank)

    model = convolutional(dtype=torch.float32)
    two = last_of(descent(make_apart_step, model, batch_of, 50, ratio=RATIO))
    return two, one_pass(model, batch_of, 50, "world")


@way()
def unlike(rank: int) -> Any:
    model = synchronised(dist.group.WORLD)
    return make_apart_step(model, F.cross_entropy, ratio=0.5, **TOGETHER)(*split_state(model), unequal(rank))


def unequal(rank: int) -> tuple[Tensor, Tensor]:
    return images(8 + 4 * rank, seed=rank)


@way()
def single_rows(rank: int) -> Any:
    """One sample a rank, in a layer that sees one value of each."""
    model = nn.SyncBatchNorm(3).double()
    return functionalize(model)(*split_state(model), torch.arange(3.0).double().view(1, 3) + rank, training=True)


@way()
def sam(rank: int) -> Any:
    return step_of(rank, make_apart_sam_step, rho=0.1)


@way()
def drawn(rank: int) -> Any:
    """Random signs, from generators that differ, in every form."""
    found = [
        step_of(rank, make, rule=random_sign_perturbation).perturbation
        for make in (make_apart_step, make_one_pass_step)
    ]
    model = convolutional()
    apart, in_one = APART(model, rule=random_sign_perturbation, process_group="world"), APART(model, **TOGETHER)
    torch.manual_seed(rank)
    both_passes(apart, shard(rank))
    in_one_pass(in_one, shard(rank))
    return [*found, apart.perturbation, in_one.perturbation]


def sometimes() -> nn.Module:
    """Calls a layer on the first rank alone, and one nowhere."""

    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.first(x)
        return model.last(x if dist.get_rank() else model.second(x * x))

    torch.manual_seed(0)
    norms = {name: nn.BatchNorm1d(3) for name in ("first", "second", "third")}
    return Parts(forward, **norms, last=nn.Linear(3, 3))


@way()
def called_sometimes(rank: int) -> Any:
    model = sometimes()
    step = make_one_pass_step(model, F.cross_entropy, rule=sign_perturbation, **TOGETHER)
    carried = {name: type(shift)(shift.mean + 0.05, shift.scale) for name, shift in init_perturbation(model).items()}
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(8, 3, generator=generator).double(), torch.randint(3, (8,), generator=generator)
    return step(*split_state(model), batch, carried)


@way()
def not_finite(rank: int) -> Any:
    model = convolutional()
    params, buffers = split_state(model)
    x, y = shard(rank)
    if rank:
        x[0] = torch.inf
    found = []
    for make in (make_apart_step, make_one_pass_step):
        out = make(model, F.cross_entropy, **TOGETHER)(params, buffers, (x, y))
        found.append((bool(out.all_finite), all(torch.equal(out.buffers[k], b) for k, b in buffers.items())))
    return found


@way()
def reductions(rank: int) -> dict[str, list[int]]:
    """How many values each all-reduce of a second step has; the first one also compares the ranks."""
    model, sizes = convolutional(), list[int]()
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    steps: dict[str, tuple[Any, ...]] = {
        "two passes": (make_apart_step(model, F.cross_entropy, **TOGETHER),),
        "micro-batches": (make_apart_step(model, F.cross_entropy, microbatches=2, **TOGETHER),),
        "ascent": (make_apart_step(model, F.cross_entropy, rho=0.1, **TOGETHER),),
        "one pass": (make_one_pass_step(model, F.cross_entropy, **TOGETHER),),
        "carried": (
            make_one_pass_step(model, F.cross_entropy, rule=sign_perturbation, **TOGETHER),
            init_perturbation(model),
        ),
    }
    found = {}
    for name, (step, *more) in steps.items():
        step(*split_state(model), shard(rank), *more)
        sizes.clear()
        with patch.object(dist, "all_reduce", counted):
            step(*split_state(model), shard(rank), *more)
        found[name] = list(sizes)
    return found


@way(4)
def compiled(rank: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 3)).double()  # little to trace
    step, arguments = make_apart_step(model, F.cross_entropy, **TOGETHER), (*split_state(model), shard(rank))
    return step(*arguments).grads, torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments).grads


@way()
def swept(rank: int) -> Any:
    model, batch = synchronised(), shard(rank)
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy, **TOGETHER)
    radii = torch.tensor([EPSILON, 0.05], dtype=torch.float64)
    mapped = torch.func.vmap(lambda epsilon: step(params, buffers, batch, epsilon=epsilon).grads)(radii)
    return mapped, [step(params, buffers, batch, epsilon=radius).grads for radius in radii]


@way(4)
def compiled_synchronised(rank: int) -> str:
    model = synchronised()
    step = torch.compile(make_apart_step(model, F.cross_entropy), backend="aot_eager", fullgraph=True)
    try:
        step(*split_state(model), shard(rank))
    except Exception as error:  # Dynamo puts its own class around ours
        return str(error)
    return "nothing was said"


@way(4)
def halves(rank: int) -> Any:
    """Four ranks as two groups of two, which train apart."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    model = synchronised(group)
    return last_of(descent(make_apart_step, model, partial(shard, rank % 2), LONG, ratio=0.5, process_group=group))


@way()
def disagreements(rank: int) -> dict[str, str]:
    """What is said where the second rank has something else."""
    model, batch = convolutional(), shard(rank)
    wider = nn.Sequential(*model, nn.Linear(3, 3).double()) if rank else model
    other = convolutional()
    if rank:
        nn.init.ones_(other[0].weight)
    of_tokens = torch.randn(4, 2, 3).double(), torch.zeros(4, dtype=torch.long)

    def tried(model: nn.Module, batch: Any = batch, make: Any = make_apart_step, **settings: Any) -> Any:
        step = make(model, F.cross_entropy, **{"epsilon": 0.1, "groups": 2, "process_group": "world"} | settings)
        return lambda: step(*split_state(model), batch)

    calls = {
        "settings": tried(model, epsilon=0.1 + 0.1 * rank),
        "form": tried(model, make=make_one_pass_step if rank else make_apart_step),
        "model": tried(wider),
        "values": tried(other),
        "batch": tried(model, (batch[0].float() if rank else batch[0], batch[1])),
        "drop-in": lambda: APART(model, groups=2 * rank, process_group="world").to_proxy().__enter__(),
        "groups": lambda: both_passes(APART(synchronised(), groups=-1, process_group="world"), batch),
        "functional groups": tried(synchronised(), groups=-1),
        "subclass": tried(nn.Sequential(Activated(2).double(), *model)),
        "rows": tried(tokens(), of_tokens, make_one_pass_step, rows=lambda layer, x: torch.arange(len(x)) // 2),
    }
    return {name: refusal(call) for name, call in calls.items()}


class Activated(nn.SyncBatchNorm):
    """A synchronised layer with a forward of its own, which does not reach F.batch_norm while it synchronises."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def tokens() -> nn.Module:
    """Two rows a sample in a synchronised layer."""
    return Parts(lambda m, x: m.norm(x.flatten(0, 1)).view(x.shape).mean(1), norm=nn.SyncBatchNorm(3))


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ApartError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


# Wrappers.


def unused() -> nn.Module:
    return Parts(lambda m, x: m.body(x), body=convolutional(), head=nn.Linear(3, 3))


@way()
def wrappers(rank: int) -> dict[str, Any]:
    """Two passes of the drop-in in every kind of wrapper, which end alike."""
    from torch.distributed.fsdp import fully_shard

    def data_parallel(first_without: int = STEPS, **options: Any) -> Any:
        model = unused() if options.get("find_unused_parameters") else convolutional()
        wrapped = DistributedDataParallel(model, **options)
        return trained(rank, wrapped, APART(wrapped, EPSILON, GROUPS), first_without)

    def sharded(blocks: tuple[int, ...]) -> Any:
        model = convolutional()
        for block in blocks:
            fully_shard(model[block])
        fully_shard(model)
        return trained(rank, model, APART(model, EPSILON, GROUPS, process_group="world"), STEPS)

    return {
        "plain": data_parallel(),
        "no_sync": data_parallel(0),
        "static_graph": data_parallel(static_graph=True),
        # in the first iteration, DistributedDataParallel's own assertion fails, in plain training as well
        "static_graph and no_sync": data_parallel(1, static_graph=True),
        "gradient_as_bucket_view": data_parallel(gradient_as_bucket_view=True),
        "find_unused_parameters": data_parallel(find_unused_parameters=True),
        "fully_shard": sharded(()),
        "fully_shard of every block": sharded((0, 1, 3, 4)),
    }


def trained(rank: int, model: Any, apart: APART, first_without: int) -> dict[str, Tensor]:
    """Train, in the proxy passes from a step on without reduction of gradients."""
    steps = iter(range(STEPS))

    def backward(batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        with apart.to_proxy(), model.no_sync() if next(steps) >= first_without else nullcontext():
            (F.cross_entropy(model(x), y) / 2).backward()
        with apart.to_adver():
            (F.cross_entropy(model(x), y) / 2).backward()

    for _ in loop(model, partial(shard, rank), backward):
        pass
    state = {name.removeprefix("module.").removeprefix("body."): p for name, p in model.named_parameters()}
    state = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in state.items()}
    return {name: p.detach().clone() for name, p in state.items() if not name.startswith("head")}


@way()
def late(rank: int) -> dict[str, Any]:
    """The method around a model that is wrapped later, or by nothing that is known."""
    found: dict[str, Any] = {}
    for name, setting in (("unsaid", None), ("local", "local"), ("world", "world")):
        model = convolutional()
        apart = APART(model, EPSILON, GROUPS, process_group=setting)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for t in range(2):
                both_passes(apart, shard(rank, t))
        found[name] = (without_prefix(apart.perturbation), [str(warning.message) for warning in said])
    return found


@way()
def distributed_tensors(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_module

    mesh = init_device_mesh("cpu", (RANKS,))
    model = distribute_module(convolutional(), mesh)
    x, y = (DTensor.from_local(part, mesh, [Shard(0)]) for part in shard(rank))
    return refusal(lambda: both_passes(APART(model, process_group="world"), (x, y)))


def without_prefix(tree: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("module."): Shift(*value) for name, value in tree.items()}


# What is checked of it.


def results_of(ranks: int, folder: Path) -> Results:
    spawn(on_rank, (folder, ranks), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=["ranks", pytest.param("four_ranks", marks=pytest.mark.slow)])
def some_ranks(request: pytest.FixtureRequest) -> Results:
    found: Results = request.getfixturevalue(request.param)
    return found


def averaged(trees: list[Any]) -> Any:
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
        "buffers": averaged([proxy.buffers for proxy in proxies]),
        "loss": averaged([proxy.loss for proxy in proxies]),
    }


@pytest.mark.parametrize("way", ["wrapped", "inner", "functional", "by_rule", "accumulated", "sam", "drawn", "mean"])
def test_what_ranks_find_together_is_equal_on_all_of_them_to_the_last_bit(ranks: Results, way: str) -> None:
    first, second = (found.grads if way == "sam" else found for found in (results[way] for results in ranks))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("way", "worlds"),
    [
        *((way, "ranks") for way in ("wrapped", "inner", "functional")),
        pytest.param("functional", "four_ranks", marks=pytest.mark.slow),
    ],
)
def test_every_step_is_that_of_the_definition_on_averaged_shards(way, worlds, request):
    ranks, model = request.getfixturevalue(worlds), convolutional()
    for t, found in enumerate(ranks[0][way]):
        expected = definition(model, [shard(rank, t) for rank in range(len(ranks))], found["perturbation"], RATIO)
        if way != "functional":  # gradients are reduced by the wrapper, which sends rank 0's buffers to all
            expected.pop("loss")
            expected["buffers"] = oracle_proxy(model, F.cross_entropy, *shard(0, t)).buffers
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, check_dtype=False, **ROUNDING)
        for layer, g in expected["stat_grads"].items():
            for shift, part in zip(found["perturbation"][layer], g, strict=True):
                clear = part.abs() > 1e-12  # where the sign is no matter of rounding
                assert torch.equal(shift[clear], EPSILON * part.sign()[clear])
        params = {name: p.detach() - LEARNING_RATE * found["grads"][name] for name, p in model.named_parameters()}
        model.load_state_dict(params | found["buffers"])


def test_one_pass_draws_one_perturbation_for_all_ranks_and_another_in_every_step(ranks: Results) -> None:
    for first, second in zip(*(results["wrapped_one_pass"] for results in ranks), strict=True):
        for key in ("perturbation", "grads"):
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    drawn = [step["perturbation"]["4"].mean for step in ranks[0]["wrapped_one_pass"]]
    assert not all(torch.equal(drawn[0], later) for later in drawn[1:])


def test_one_pass_on_several_ranks_is_the_definition_on_averaged_shards(ranks: Results) -> None:
    model = convolutional()
    for t, seen in enumerate(ranks[0]["wrapped_one_pass"]):
        model.load_state_dict(seen["before"])
        steps = [
            oracle_one_pass_step(
                model, F.cross_entropy, shard(rank, t), seen["perturbation"], epsilon=EPSILON, groups=GROUPS, clean=1
            )
            for rank in range(RANKS)
        ]
        torch.testing.assert_close(seen["grads"], averaged([step.grads for step in steps]), **ROUNDING)


def test_accumulation_without_synchronisation_still_has_one_perturbation_for_all_ranks(ranks):
    found = ranks[0]["accumulated"]
    parts = [
        definition(convolutional(), [shard(rank, t) for rank in range(RANKS)], perturbation, 1.0)["grads"]
        for t, perturbation in enumerate(found["perturbations"])
    ]
    total = {name: grad + parts[1][name] for name, grad in parts[0].items()}
    torch.testing.assert_close(found["grads"], total, **ROUNDING)


def test_the_mean_over_ranks_keeps_the_tree(ranks: Results) -> None:
    expected = {"a": StatGrads(torch.full((2,), 1.5), torch.arange(2.0)), "b": StatGrads(*torch.eye(2) / 2)}
    torch.testing.assert_close(ranks[0]["mean"], expected, rtol=0, atol=0)
    assert type(ranks[0]["mean"]["a"]) is StatGrads


@pytest.fixture(scope="module")
def one_process() -> Callable[[int], dict[str, Any]]:
    """What one process finds on the whole batches of so many ranks."""
    found: dict[int, dict[str, Any]] = {}

    def of(ranks: int) -> dict[str, Any]:
        if ranks not in found:
            found[ranks] = all_forms(lambda chosen: lambda t: whole_batch(t, ranks, chosen), None)
        return found[ranks]

    return of


@pytest.mark.parametrize("form", FORMS)
def test_ranks_with_synchronised_layers_are_one_process_on_the_whole_batch(form, some_ranks, one_process):
    for results in some_ranks:
        torch.testing.assert_close(results["all_synchronised"][form], one_process(len(some_ranks))[form], **ROUNDING)


def test_fifty_steps_leave_ranks_equal_to_the_last_bit(some_ranks: Results) -> None:
    for results in some_ranks:
        for first, own in zip(some_ranks[0]["long"], results["long"], strict=True):
            assert torch.isfinite(own[2])
            for place in (0, 1, 2, 3, 5, 6):  # all but the batch statistics, which are a rank's own
                torch.testing.assert_close(own[place], first[place], rtol=0, atol=0)


def test_ranks_of_unlike_numbers_of_samples_weigh_alike_under_the_moments_of_all_samples(ranks):
    out, model = ranks[0]["unlike"], convolutional()
    shards = [unequal(rank) for rank in range(RANKS)]
    cut = [(x[: len(x) // 2], y[: len(y) // 2]) for x, y in shards]

    def loss_of_ranks(parts: Any) -> Callable[[Tensor, Tensor], Tensor]:
        sizes = [len(y) for _, y in parts]
        return lambda output, target: (
            sum(map(F.cross_entropy, output.split(sizes), target.split(sizes))) / RANKS  # type: ignore[return-value]
        )

    def joined(parts: Any) -> Any:
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    proxy = oracle_proxy(model, loss_of_ranks(shards), *joined(shards))
    shift = {name: Shift(*pair) for name, pair in out.perturbation.items()}
    second = oracle_adversarial(model, loss_of_ranks(cut), *joined(cut), shift, 2)
    expected = {name: 2 / 3 * grad + 1 / 3 * second.grads[name] for name, grad in proxy.grads.items()}
    torch.testing.assert_close(out.grads, expected, **ROUNDING)
    torch.testing.assert_close((out.loss, out.adversarial_loss), (proxy.loss, second.loss), **ROUNDING)
    torch.testing.assert_close(out.buffers, proxy.buffers, check_dtype=False, **ROUNDING)
    torch.testing.assert_close({k: Shift(*g) for k, g in out.stat_grads.items()}, proxy.stat_grads, **ROUNDING)


def test_one_value_on_each_rank_has_a_variance(ranks: Results) -> None:
    values = torch.tensor([[-0.5], [0.5]]).double() / (0.25 + 1e-5) ** 0.5
    for results, value in zip(ranks, values, strict=True):
        torch.testing.assert_close(results["single_rows"], value.expand(1, 3), **ROUNDING)


def test_the_ascent_in_weights_follows_the_averaged_gradient(ranks: Results) -> None:
    first = ranks[0]["sam"]
    shift = {name: Shift(*pair) for name, pair in first.perturbation.items()}
    model, shards = convolutional(), [shard(rank) for rank in range(RANKS)]
    g = averaged([oracle_proxy(model, F.cross_entropy, *one).grads for one in shards])
    norm = sum((grad**2).sum() for grad in g.values()) ** 0.5
    up = convolutional()
    with torch.no_grad():
        for name, parameter in up.named_parameters():
            parameter += 0.1 * g[name] / norm
    second_grads = averaged([oracle_adversarial(up, F.cross_entropy, *one, shift, 2).grads for one in shards])
    torch.testing.assert_close(first.grads, {k: (g[k] + second_grads[k]) / 2 for k in g}, **ROUNDING)


def test_rules_of_gradients_and_rules_that_draw_move_every_layer(ranks: Results) -> None:
    assert ranks[0]["by_rule"].keys() == {"1", "4"}
    assert all((shift.mean != 0).all() for found in ranks[0]["drawn"] for shift in found.values())


def test_layers_that_some_ranks_call_have_one_perturbation_and_those_that_none_does_keep_theirs(ranks):
    first, second = (results["called_sometimes"] for results in ranks)
    torch.testing.assert_close(first.perturbation, second.perturbation, rtol=0, atol=0)
    assert "second" in first.stats
    assert "second" not in second.stats
    assert set(first.perturbation["second"].mean.abs().tolist()) == {EPSILON}
    assert set(first.perturbation["third"].mean.tolist()) == {0.05}


def test_what_is_not_finite_on_one_rank_is_seen_by_all(ranks: Results) -> None:
    for results in ranks:
        assert results["not_finite"] == [(False, True)] * 2


def test_a_step_reduces_gradients_once(ranks: Results) -> None:
    model = convolutional()
    trained = sum(parameter.numel() for parameter in model.parameters())
    channels = sum(shift.mean.numel() for shift in init_perturbation(model).values())
    # gradients, running statistics, both losses, and whether all is finite
    bucket = trained + 2 * channels + 3
    # statistics and their gradients, and how many ranks called each layer
    statistics = 5 * channels
    for results in ranks:
        assert results["reductions"] == {
            "two passes": [statistics, bucket],
            "micro-batches": [statistics, statistics, bucket],
            "ascent": [statistics, trained, bucket],
            "one pass": [2 * channels, bucket],  # signs of the first rank
            "carried": [statistics, bucket],
        }


@pytest.mark.slow
def test_a_step_on_several_ranks_compiles(four_ranks: Results) -> None:
    for results in four_ranks:
        eager, in_one_graph = results["compiled"]
        torch.testing.assert_close(in_one_graph, eager, **ROUNDING)
        torch.testing.assert_close(in_one_graph, four_ranks[0]["compiled"][1], rtol=0, atol=0)


def test_a_step_on_several_ranks_maps_also_over_collective_calls_that_are_differentiated(ranks):
    for results in ranks:
        mapped, one_by_one = results["swept"]
        for place, grads in enumerate(one_by_one):
            torch.testing.assert_close({name: grad[place] for name, grad in mapped.items()}, grads, **ROUNDING)


@pytest.mark.slow
def test_a_compiler_says_that_it_cannot_synchronise_layers(four_ranks: Results) -> None:
    for results in four_ranks:
        assert "SyncBatchNorm does not compile" in results["compiled_synchronised"]


@pytest.mark.slow
def test_a_group_of_some_ranks_is_a_world_of_its_own(ranks: Results, four_ranks: Results) -> None:
    for rank, results in enumerate(four_ranks):
        expected = ranks[rank % 2]["all_synchronised"]["two passes 0.5 2"]
        torch.testing.assert_close(results["halves"], expected, **ROUNDING)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("settings", "RanksError: the settings of rank 1 differ from those of rank 0"),
        ("form", "OnePassStep"),
        ("model", "RanksError: the names, shapes and dtypes of params"),
        ("values", "torch.distributed.broadcast"),
        ("batch", "torch.float32 of 4 dimensions"),
        ("drop-in", "RanksError: the settings of rank 1"),
        ("groups", "SettingError: groups=-1"),
        ("functional groups", "SettingError: groups=-1"),
        ("subclass", "ModelError: layer '0' (Activated) ran without calling torch.nn.functional.batch_norm"),
        ("rows", "BatchError: layer 'norm' is synchronised"),
    ],
)
def test_what_differs_or_cannot_be_is_said_on_every_rank(what: str, words: str, ranks: Results) -> None:
    for results in ranks:
        assert words in results["disagreements"][what]


def test_the_drop_in_is_the_same_in_every_wrapper(ranks: Results) -> None:
    for results in ranks:
        plain = results["wrappers"]["plain"]
        assert len(plain) == 8
        for name, found in results["wrappers"].items():
            torch.testing.assert_close(found, plain, msg=lambda text, name=name: f"{name}: {text}", **ROUNDING)


def test_without_a_wrapper_the_drop_in_takes_all_ranks_and_says_so_once(ranks: Results) -> None:
    found = [results["late"] for results in ranks]
    for perturbation, said in (one["unsaid"] for one in found):
        assert len(said) == 1
        assert "averages statistic gradients over all 2 ranks" in said[0]
        torch.testing.assert_close(perturbation, found[0]["world"][0], rtol=0, atol=0)
    assert [one[name][1] for one in found for name in ("local", "world")] == [[]] * 4
    own = [torch.cat([part for shift in one["local"][0].values() for part in shift]) for one in found]
    assert not torch.equal(*own)


def test_a_batch_of_distributed_tensors_is_refused(ranks: Results) -> None:
    for results in ranks:
        assert results["distributed_tensors"].startswith("BatchError: layer '1' got a DTensor")


def test_a_process_group_is_needed_for_the_world_and_for_nothing_else() -> None:
    model = convolutional()
    with pytest.raises(SettingError, match="no process group is initialised"):
        make_apart_step(model, F.cross_entropy, process_group="world")(*split_state(model), images())
    with pytest.raises(SettingError, match="expected a ProcessGroup of this rank"):
        APART(model, process_group="all")  # type: ignore[arg-type]
    step = make_apart_step(model, F.cross_entropy, process_group="local")
    assert step(*split_state(model), images()).all_finite


# Faults.


def lose(rank: int, folder: Path, how: str) -> None:
    """Take steps; after the first the second rank is gone, or does not come any more."""
    model = convolutional()
    with world(rank, folder, RANKS):
        group = dist.new_group(timeout=timedelta(seconds=20))
        step = make_apart_step(model, F.cross_entropy, process_group=group)
        step(*split_state(model), shard(rank))
        if rank and how == "gone":
            os._exit(1)
        while rank:
            time.sleep(1)
        try:
            step(*split_state(model), shard(rank))
        except RanksError as error:
            (folder / "said").write_text(str(error))
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "hangs"])
def test_a_rank_that_is_lost_ends_the_others_with_an_error(how: str, tmp_path: Path) -> None:
    processes = [get_context("spawn").Process(target=lose, args=(rank, tmp_path, how)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    processes[0].join()
    processes[1].kill()
    processes[1].join()
    assert "rank 0 waited for the other ranks in vain" in (tmp_path / "said").read_text()
