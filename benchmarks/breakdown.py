"""Where the time of a step goes, and how far it is from the floor.

    python benchmarks/breakdown.py --quick
    python benchmarks/breakdown.py --parts profile --models timm/lcnet_035 digits --methods 'one pass'
    python benchmarks/breakdown.py --parts layer --shapes 128x64x32x32

    eager      a model of nothing but overhead: what each part of the functional step adds to two plain steps
    profile    eager steps by kinds of work, by operators and by functions of Python, against the plain steps in them
    checks     whether all gradients are finite, against the step and the fastest way to read them once
    compiled   the compiled step by kinds of kernels, against twice the compiled plain step
    layer      the layer alone, in traffic over the activations, against the fastest copy of them

The parts of the eager step are differences of times taken in the same rounds, and add up to the step. Operators are
those that `torch.profiler` saw, functions those that `cProfile` saw, medians over interleaved calls; what takes longer
than in the plain steps stands first. Under a profiler each takes longer, so that calls and shares say more than times.
What is not arithmetic is the time in views, allocation, autograd's nodes, and outside of operators, which is Python and
autograd's engine. No layer can do with fewer than 8 passes over the activations: forward x for the statistics, then x
and y; backward x and the gradient for two sums, then x and both gradients. What memory needs for them is the time of 4
copies. Passes are counted from arguments and results of operators; one that needs sums before it writes reads twice.
"""

from __future__ import annotations

import cProfile
import itertools
import pstats
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import layer_cost
import torch
import torch.nn.functional as F
from common import (
    CLOCKS,
    Row,
    Sheet,
    TimedRounds,
    interleaved,
    medians_of,
    relative_to,
    run_script,
    spread,
    time_cells,
    time_columns,
    timing_row,
    turns,
)
from networks import NETWORKS, expanded, make_case
from steps import METHODS, ONE_GRAPH, RADIUS, Step, Variant
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

from apart_func import adversarial_pass, all_finite, functionalize, proxy_pass, sign_perturbation, split_state

EAGER = "overhead"
ACTIVATIONS = (8, 8, 8, 8)  # of all BN layers of that model
STEP, FLOOR = "the step", "two plain steps"

FLOORS = {"one pass": "a plain step", "one pass drop-in": "a plain step"}  # of other methods: two of them

NODE, VIEW, OTHER = "autograd's nodes", "views and allocation", "other arithmetic"
# Kinds of operators in eager steps: those whose names contain a word, and those that only look at memory or take some.
OPERATORS = {
    "convolutions": ("convolution", "conv2d"),
    "batch norm": ("batch_norm",),
    "matrix products": ("addmm", "::mm", "linear"),
    NODE: ("Backward",),
}
VIEWS = re.compile(
    "(aten::)?(_?(reshape|view|unsafe_view|reshape_alias|as_strided|detach|alias|expand|select|slice|narrow|permute|"
    "transpose|t|movedim|squeeze|unsqueeze|flatten|unflatten|split|chunk|unbind|empty|empty_like|empty_strided|"
    "new_empty|resize|set))_?"
)

KINDS = {  # of kernels in compiled steps, by what their names contain; the first that fits
    "fused kernels": ("fused",),
    "convolutions": ("convolution", "conv2d"),
    "matrix products": ("addmm", "::mm", "linear"),
    "copies": ("copy_", "clone", "contiguous"),
}
CHECKED, CHECK, READING = "one pass", "whether all are finite", "reading all gradients once"
ELSE = "everything else"
OUTSIDE = "outside of operators"
CALL, WRAPPER = re.compile("## Call CompiledFxGraph .* ##"), "what calls the kernels"
APART = "APART compiled"

FLOOR_PASSES = 8  # over the activations
COPIES = f"{FLOOR_PASSES // 2} copies"


@dataclass(frozen=True)
class Settings(TimedRounds):
    """What is looked at, and for how long.

    Attributes:
        parts: eager, profile, checks, compiled, layer.
        models: the networks of the profiled and checked steps; see networks.py.
        methods: the profiled steps; see steps.py.
        compiled_model: the network of the compiled step; see networks.py.
        groups: ghost groups in the adversarial pass, at most half its samples.
        shapes: of the layer's activations, (N, C, ...), as in 128x64x16x16.
        layouts: memory formats of the activations.
        dtypes: of the activations.
        shown: operators or kernels in a table.
    """

    parts: tuple[Literal["eager", "profile", "checks", "compiled", "layer"], ...] = (
        "eager",
        "profile",
        "checks",
        "compiled",
        "layer",
    )
    models: tuple[str, ...] = (
        "overhead",
        "digits",
        "timm/lcnet_035",
        "timm/mobilenetv3_small_050",
        "timm/resnet18",
    )
    methods: tuple[str, ...] = ("APART", "one pass")
    compiled_model: str = "cifar_resnet"
    groups: int = 16
    shapes: tuple[str, ...] = ("128x16x32x32", "128x64x8x8")
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    shown: int = 10


# One thread: two stall each other at random when anything else runs on the machine.
QUICK = Settings(parts=("eager", "profile", "checks", "layer"), rounds=7, seconds=0.05, threads=1)


class Operator(NamedTuple):
    """What a profile says of an operator or a function, a call of what is profiled.

    Attributes:
        calls: how often it ran.
        seconds: its own time.
    """

    calls: float
    seconds: float


NONE = Operator(0, 0)
Profile = dict[str, Operator]


def profiles(steps: Mapping[str, Step], settings: Settings, look: Callable[[Step, str], Profile]) -> dict[str, Profile]:
    """Profile some functions in turn.

    Args:
        steps: functions by name. Each is called once before.
        settings: rounds, threads and device.
        look: `operators` or `frames`.

    Returns:
        For each what was found: medians over the rounds.
    """
    torch.set_num_threads(settings.threads)
    found: dict[str, list[Profile]] = {name: [] for name in steps}
    for turn, name in enumerate(turns("profiles", steps, settings.rounds + 1)):
        if turn < len(steps):
            steps[name]()
        else:
            found[name].append(look(steps[name], settings.device))
    return {name: middle(rounds) for name, rounds in found.items()}


def middle(rounds: Sequence[Profile]) -> Profile:
    """The median of every operator."""
    names = dict.fromkeys(name for profiled in rounds for name in profiled)
    columns = {name: [profiled.get(name, NONE) for profiled in rounds] for name in names}
    return {name: Operator(*map(median, zip(*column, strict=True))) for name, column in columns.items()}


def operators(step: Step, device: str) -> Profile:
    """The operators of one call, and the time outside of them."""
    on_device = device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiled:
        start = timer()
        step()
        wall = timer() - start
    time_of = "self_device_time_total" if on_device else "self_cpu_time_total"  # in microseconds
    found = joined(
        (CALL.sub(WRAPPER, event.key), Operator(event.count, getattr(event, time_of) / 1e6))
        for event in profiled.key_averages()
    )
    return found | {OUTSIDE: Operator(0, wall - sum(operator.seconds for operator in found.values()))}


def frames(step: Step, device: str) -> Profile:
    """The functions of one call, in Python and of it, by file and name."""
    with cProfile.Profile() as profiled:
        step()
    found: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(profiled).stats  # type: ignore[attr-defined]
    return joined(
        (f"{_place(file)}{function}", Operator(calls, own))
        for (file, _, function), (_, calls, own, *_) in found.items()
    )


def _place(file: str) -> str:
    """The last folder and the name of a file; nothing for what is built in."""
    return "" if file == "~" else "/".join(Path(file).parts[-2:]) + ":"


def kinds(profiled: Profile, kind_of: Callable[[str], str]) -> Profile:
    """The operators of each kind together."""
    return joined((kind_of(name), operator) for name, operator in profiled.items())


def kind_by_words(name: str, kinds: Mapping[str, Sequence[str]], others: str) -> str:
    """The first kind of which the name contains a word."""
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), others)


def kind_of_operator(name: str) -> str:
    """The kind of an operator in an eager step."""
    if name == OUTSIDE:
        return OUTSIDE
    if VIEWS.fullmatch(name):
        return VIEW
    return kind_by_words(name, OPERATORS, OTHER) if "::" in name else NODE


def joined(operators: Iterable[tuple[str, Operator]]) -> Profile:
    """The sum for every name."""
    sums: Profile = {}
    for name, (calls, seconds) in operators:
        before = sums.get(name, NONE)
        sums[name] = Operator(before.calls + calls, before.seconds + seconds)
    return sums


def comparison(title: str, profiles: Mapping[str, Profile], shown: int) -> list[Row]:
    """Profiles side by side: their sum, and what takes longest in the last one; of two, what takes longer than before.

    Args:
        title: of the table.
        profiles: by the heads of their columns.
        shown: number of rows.

    Returns:
        The rows.
    """
    *_, last = profiles.values()
    first = next(iter(profiles.values())) if len(profiles) == 2 else {}
    names = dict.fromkeys([*last, *first])
    excess = {name: last.get(name, NONE).seconds - first.get(name, NONE).seconds for name in names}
    longest = sorted(names, key=lambda name: excess[name], reverse=True)[:shown]
    sums = {
        head: Operator(*(sum(values) for values in zip(*profiled.values(), strict=True)))
        for head, profiled in profiles.items()
    }
    found = {"all": sums} | {
        name: {head: profiled.get(name, NONE) for head, profiled in profiles.items()} for name in longest
    }

    def cells(of: Mapping[str, Operator]) -> Row:
        return {head: {**each._asdict(), "share": each.seconds / sums[head].seconds} for head, each in of.items()}

    return [{"table": title, "name": name, "operators": cells(of)} for name, of in found.items()]


def twice(step: Step) -> Step:
    """Two steps for one: what two passes must cost."""
    return lambda: (step(), step())


def eager(settings: Settings) -> list[Row]:
    """What the parts of the functional step cost where arithmetic costs nothing.

    Args:
        settings: rounds, groups and device.

    Returns:
        A row for every part.
    """
    case = make_case(EAGER, settings.device)
    fmodel, (params, buffers) = functionalize(case.model), split_state(case.model)
    proxy = proxy_pass(fmodel, F.cross_entropy, params, buffers, case.batch)
    pushed = sign_perturbation(proxy.stats, proxy.stat_grads, torch.tensor(RADIUS, device=settings.device))
    groups = min(settings.groups, len(case.batch[1]) // 2)
    layers = sum(isinstance(module, _BatchNorm) for module in case.model.modules())
    layer = layer_cost.make_layer(ACTIVATIONS, "contiguous", torch.float32, settings.device)
    variant = Variant(groups=groups)
    plain = METHODS["plain"].make(case, variant, ONE_GRAPH)
    apart = METHODS["APART"].make(case, variant, ONE_GRAPH)
    steps: dict[str, Step] = {
        "plain": plain,
        "APART": apart,
        "proxy": lambda: proxy_pass(fmodel, F.cross_entropy, params, buffers, case.batch),
        "adversarial": lambda: adversarial_pass(
            fmodel, F.cross_entropy, params, buffers, case.batch, pushed, groups=groups
        ),
        "F.batch_norm": lambda: layer_cost.plain(layer),
        "clean": lambda: layer_cost.clean(layer),
        "perturbed": lambda: layer_cost.perturbed(layer, groups),
    }
    times = interleaved("eager", steps, settings)
    rows: dict[str, Row] = {}
    for clock in CLOCKS:
        medians = {name: medians_of(times[name], clock) for name in steps}
        parts = [
            parts_of(dict(zip(medians, seconds, strict=True)), layers)
            for seconds in zip(*medians.values(), strict=True)
        ]
        values = {part: [each[part] for each in parts] for part in parts[0]}
        for part in values:
            row = rows.setdefault(part, {"table": f"parts of an eager step on {EAGER}, groups {groups}", "part": part})
            ratios = relative_to(values, part, [STEP, FLOOR])
            row[clock] = {"seconds": asdict(spread(values[part])), "relative_to": ratios}
    return list(rows.values())


def parts_of(seconds: Mapping[str, float], layers: int) -> dict[str, float]:
    """The time of a step, taken apart.

    Args:
        seconds: of the step, its passes, and single layers.
        layers: how many layers the model has.

    Returns:
        The step, and parts that add up to it.
    """
    plain = seconds["plain"]
    clean, perturbed = (layers * (seconds[name] - seconds["F.batch_norm"]) for name in ("clean", "perturbed"))
    return {
        STEP: seconds["APART"],
        FLOOR: 2 * plain,
        f"{layers} clean layers, beyond F.batch_norm": clean,
        f"{layers} perturbed layers, beyond F.batch_norm": perturbed,
        "rest of the proxy pass": seconds["proxy"] - plain - clean,
        "rest of the adversarial pass": seconds["adversarial"] - plain - perturbed,
        "perturbation, mean gradient, checks": seconds["APART"] - seconds["proxy"] - seconds["adversarial"],
    }


def profiled(settings: Settings) -> Iterator[Row]:
    """What eager steps do that the plain steps in them do not.

    Args:
        settings: models, methods, rounds, groups and device.

    Yields:
        For every step its kinds of work, operators, and functions of Python.
    """
    for model, method in itertools.product(expanded(settings.models), settings.methods):
        case = make_case(model, settings.device)
        variant = Variant(groups=min(settings.groups, NETWORKS[model].samples // 2))
        plain = METHODS["plain"].make(case, variant, ONE_GRAPH)
        floor = FLOORS.get(method, FLOOR)
        steps = {
            floor: twice(plain) if floor == FLOOR else plain,
            method: METHODS[method].make(case, variant, ONE_GRAPH),
        }
        title = f"{method} on {model}, batch of {len(case.batch[1])}, groups {variant.groups}"
        found = profiles(steps, settings, operators)
        by_kind = {name: kinds(each, kind_of_operator) for name, each in found.items()}
        yield from comparison(f"kinds of work in {title}", by_kind, len(OPERATORS) + 3)
        yield from comparison(f"operators of {title}", found, settings.shown)
        yield from comparison(f"functions of {title}", profiles(steps, settings, frames), settings.shown)


def checks(settings: Settings) -> Iterator[Row]:
    """What it takes to see that all gradients are finite.

    Args:
        settings: models, rounds, groups and device.

    Yields:
        For every model the step, its check, and a product of BLAS that reads the same memory.
    """
    for model in expanded(settings.models):
        case = make_case(model, settings.device)
        variant = Variant(groups=min(settings.groups, NETWORKS[model].samples // 2))
        grads = [torch.randn_like(param) for param in case.model.parameters()]
        steps: dict[str, Step] = {
            CHECKED: METHODS[CHECKED].make(case, variant, ONE_GRAPH),
            CHECK: partial(all_finite, grads),
            READING: partial(read_once, [grad.flatten() for grad in grads]),
        }
        times = interleaved(f"checks of {model}", steps, settings)
        megabytes = sum(grad.nbytes for grad in grads) / 1e6
        labels = {"table": "the check of the gradients", "model": model, "megabytes": megabytes}
        yield from ({**labels, "check": name, **timing_row(times, name, [CHECKED])} for name in steps)


def read_once(vectors: Iterable[Tensor]) -> list[Tensor]:
    """Products that read all of some vectors, by BLAS."""
    return [torch.dot(vector, vector) for vector in vectors]


def compiled(settings: Settings) -> list[Row]:
    """The kernels of compiled steps.

    Args:
        settings: model, groups and device.

    Returns:
        The time in each kind of kernel, for the APART step and two of each plain one, and in single kernels.
    """
    torch._dynamo.reset()
    case = make_case(settings.compiled_model, settings.device)
    variant = Variant(groups=min(settings.groups, len(case.batch[1]) // 2))
    baselines = ("plain compiled", "plain one graph")
    steps = {f"2 × {name}": twice(METHODS[name].make(case, variant, ONE_GRAPH)) for name in baselines}
    steps[APART] = METHODS[APART].make(case, variant, ONE_GRAPH)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        found = profiles(steps, settings, operators)
    title = f"compiled steps on {settings.compiled_model}, batch of {len(case.batch[1])}, groups {variant.groups}"
    by_kind = {name: kinds(each, lambda name: kind_by_words(name, KINDS, ELSE)) for name, each in found.items()}
    return comparison(f"kinds of kernels in {title}", by_kind, len(KINDS) + 1) + comparison(
        f"kernels in {title}", {APART: found[APART]}, settings.shown
    )


class Traffic(TorchDispatchMode):
    """Counts passes over some activations: the bytes that operators read and write, in theirs."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self.unit, self.passes = activations.nbytes, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(given)}
        made = [tensor for tensor in tensors_in(results) if tensor.untyped_storage().data_ptr() not in memory]
        name = func._schema.name
        if "empty" in name or not (made or func._schema.is_mutable):  # it moves nothing, or returns a view
            return results
        changed = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
        overwritten = changed if "out" in changed or name.endswith(("copy_", "zero_", "fill_")) else set()
        read = [value for argument, value in given.items() if argument not in overwritten]
        is_training = given.get("training", given.get("train"))
        reads = 2 if "batch_norm" in name and is_training else 1
        self.passes += reads * self._passes(read) + self._passes([made, [given.get(a) for a in changed]])
        return results

    def _passes(self, tree: Any) -> float:
        return sum(tensor.nbytes for tensor in tensors_in(tree) if 0 not in tensor.stride()) / self.unit


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a pytree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def copy_often(target: Tensor, source: Tensor) -> None:
    """As many copies as the least traffic of a layer takes."""
    for _ in range(FLOOR_PASSES // 2):
        target.copy_(source)


def layer(settings: Settings) -> list[Row]:
    """The layer's traffic against its time.

    Args:
        settings: activations, rounds, groups and device.

    Returns:
        A row for every layer and kind of activations, and the operators of grouped ones that are no view.
    """
    rows: list[Row] = []
    profiled: dict[str, Step] = {}
    for shape, layout, dtype in layer_cost.inputs(settings.shapes, settings.layouts, settings.dtypes):
        size = tuple(map(int, shape.split("x")))
        tensors = layer_cost.make_layer(size, layout, getattr(torch, dtype), settings.device)
        functions = layer_cost.calls(tensors, (1, settings.groups))
        passes = {}
        for name, function in functions.items():
            with Traffic(tensors.x) as traffic:
                function()
            passes[name] = traffic.passes
        target, source = torch.empty_like(tensors.x), tensors.x.detach()
        functions[COPIES] = partial(copy_often, target, source)
        passes[COPIES] = FLOOR_PASSES
        times = interleaved(f"{shape} {layout} {dtype}", functions, settings)
        labels = {"table": "traffic of one layer", "shape": shape, "layout": layout, "dtype": dtype}
        rows += [
            {**labels, "layer": name, "passes": passes[name], **timing_row(times, name, [COPIES, layer_cost.PLAIN])}
            for name in functions
        ]
        if layout == "channels_last" and shape == settings.shapes[0]:
            profiled[dtype] = functions[f"perturbed, groups {settings.groups}"]
    title = f"operators of the layer, channels_last, groups {settings.groups}, {settings.shapes[0]}"
    for dtype, found in profiles(profiled, settings, operators).items():
        rows += comparison(f"{title}, {dtype}", {dtype: found}, settings.shown)
    return rows


def measure(settings: Settings) -> Iterator[Row]:
    """Look into all parts.

    Args:
        settings: which.

    Yields:
        The rows of their tables.
    """
    parts: dict[str, Callable[[Settings], Iterable[Row]]] = {
        "eager": eager,
        "profile": profiled,
        "checks": checks,
        "compiled": compiled,
        "layer": layer,
    }
    for part in settings.parts:
        yield from parts[part](settings)


def sheets(content: Mapping[str, Any]) -> list[Sheet]:
    """The tables.

    Args:
        content: what was recorded.

    Returns:
        Every table, in the order of its first row.
    """
    tables = dict.fromkeys(row["table"] for row in content["rows"])
    return [sheet(title, [row for row in content["rows"] if row["table"] == title]) for title in tables]


def sheet(title: str, rows: Sequence[Row]) -> Sheet:
    """One table: parts of a step, checks, layers, or operators."""
    if "part" in rows[0]:
        return Sheet(
            title,
            ["part", *time_columns([STEP, FLOOR])],
            [[row["part"], *time_cells(row, [STEP, FLOOR])] for row in rows],
        )
    if "check" in rows[0]:
        return Sheet(
            title,
            ["what", "network", "gradients", *time_columns([CHECKED])],
            [[row["check"], row["model"], f"{row['megabytes']:.1f} MB", *time_cells(row, [CHECKED])] for row in rows],
        )
    if "layer" in rows[0]:
        return Sheet(
            title,
            ["layer", "activations", "passes", *time_columns([COPIES, layer_cost.PLAIN])],
            [
                [row["layer"], kind_of(row), f"{row['passes']:.1f}", *time_cells(row, [COPIES, layer_cost.PLAIN])]
                for row in rows
            ],
        )
    columns = list(rows[0]["operators"])
    heads = [head for column in columns for head in (f"{column}: calls", "time", "share")]
    return Sheet(title, ["what", *heads], [operator_line(row, columns) for row in rows])


def kind_of(row: Row) -> str:
    """The activations of a layer."""
    return f"{row['shape'].replace('x', '×')}, {row['layout']}, {row['dtype']}"


def operator_line(row: Row, columns: Iterable[str]) -> list[str]:
    """The cells of an operator."""
    cells = [f"`{row['name']}`" if re.search("[_:<]", row["name"]) else row["name"]]
    for column in columns:
        found = row["operators"][column]
        calls = f"{found['calls']:g}" if found["calls"] else ""
        cells += [calls, f"{1000 * found['seconds']:.4g} ms", f"{100 * found['share']:.0f} %"]
    return cells


if __name__ == "__main__":
    run_script(__file__, __doc__, Settings(), QUICK, measure, sheets)
