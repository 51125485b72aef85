"""Whether the library is right on networks that people use: all forms of a step, against the definition.

    PYTHONPATH=tests:benchmarks python tests/zoo/zoo.py --packages timm --models 'resnet*' --name some
    make zoo                                                        # all of them, and the tables of docs/zoo.md

For every model of `catalogue.py` a step is taken by the functional step of two passes, by that of one pass, and by both
contexts of the drop-in, and again by `oracle.py`, given the δ that the library took. A row says how far gradients,
statistic gradients and buffers are apart, what was refused and by which error, or why nothing was compared.
"""

import argparse
import copy
import gc
import json
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from catalogue import PACKAGES, Case, Entry, entries
from oracle import Shift, Step, call, fresh, map_tensors, oracle_one_pass_step, oracle_step, trained_parameters
from oracle import training_layers as layers_of
from timing import Row, Table, arguments, run
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.utils._python_dispatch import TorchDispatchMode

from apart_func import APART, ApartError, make_apart_step, make_one_pass_step, sign_perturbation, split_state

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
RADIUS, GROUPS, CLEAN = 0.1, 2, 1
LARGEST = 62  # million parameters
FORMS = ("two passes", "drop-in", "one-pass drop-in", "one pass")
KINDS = ("gradients", "statistic gradients", "running statistics")

# A statistic gradient is taken for zero where the terms that it is the sum of cancel to ten digits. Between those that
# cancel to the last digit of float64 and those that do not there is nothing: the largest of the former are 1e-13 of
# their terms, the smallest of the latter 1e-6.
CANCELS = 1e-10
# Below this the sign of a statistic gradient is left out of the comparison of signs.
CLEAR = 1e-6
# Largest ‖difference‖/‖expected‖ of a tensor, where the norm of the definition's is taken as no less than this share
# of the largest one's: the gradient of a bias in front of batch norm is zero.
LEAST_NORM = 1e-4
# Rounding of float64 in another order, as far as networks of two hundred layers enlarge it; and that of float32, to
# which some networks convert their activations whatever they are given.
TOLERANCE = {"float64": 1e-7, "float32": 2e-2}
# In single precision more is let pass of a network whose plain gradient moves more if its inputs move by a rounding:
# four times as much, since two passes at perturbed statistics add up.
NUDGE, NOISES = 1e-7, 4


# One model.


class TooLongError(BaseException):
    """A model has had its time. No `except Exception` of a package is to catch it."""


def row_of(entry: Entry, seconds: int = 60) -> Row:
    """All that is to say about a model, in so much processor time."""
    row: Row = {"package": entry.package, "family": entry.family, "model": entry.name}
    start = time.process_time()
    try:
        with limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            row |= compared(entry)
    except TooLongError:
        row |= {"outcome": "too long", "reason": f"more than {seconds} s of processor time"}
    return row | {"seconds": round(time.process_time() - start, 1)}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` after some processor time."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def compared(entry: Entry) -> Row:
    """Make a model, and compare what can be: in float64, or in float32 where it does not run in that."""
    if entry.make is None:
        return {"outcome": "no batch norm"}
    seeded()
    try:
        case = entry.make()
    except Exception as error:
        return {"outcome": "fails", "reason": f"cannot be made: {described(error)}"}
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    row: Row = {"layers": len(layers_of(case.model)), "parameters": parameters}
    if not row["layers"]:
        return row | {"outcome": "no batch norm"}
    if parameters > LARGEST * 1e6:
        return row | {"outcome": "too large", "reason": f"{parameters / 1e6:.0f} million parameters"}
    reasons = [""]
    for dtype in (torch.float64, torch.float32):
        typed = in_dtype(case, dtype)
        try:
            plain = plain_step(typed)
        except Exception as error:
            reasons.append(described(error))
            continue
        return row | {"float64": reasons[-1]} | against_definition(typed, plain)
    return row | {"outcome": "fails", "reason": f"plain training fails: {reasons[-1]}"}


class Taken(NamedTuple):
    """A step that the library has taken, or PyTorch."""

    grads: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]  # after it
    stat_grads: Mapping[str, Any] = {}  # ∂L_p/∂δ by layer; none of a step that does not need them
    perturbation: Mapping[str, Any] = {}  # of its perturbed samples


class Options(NamedTuple):
    """How a step is taken."""

    groups: int = GROUPS
    rows: Any = None


class Plain(NamedTuple):
    """A step of plain training."""

    taken: Taken
    is_double: bool  # whether all of the forward was in float64


def against_definition(case: Case, plain: Plain) -> Row:
    """Take a step in every form, and compare it with the definition's at the same δ, and that at 0 with plain training.

    Where a statistic gradient is zero but for rounding, its sign is a coin toss, and at another δ nothing could agree.
    """
    options, taken, refused = most_of(case)
    precision = "float64" if plain.is_double else "float32"
    row: Row = {"precision": precision, "groups": options.groups, "rows": options.rows, "refused": refused}
    if "two passes" not in taken:
        return row | {"outcome": "refused"}
    steps = definitions(case, options, taken)
    errors = {form: errors_of(taken[form], step) for form, step in steps.items()}
    proxy = steps["two passes"].proxy
    assert proxy is not None
    errors["plain training"] = {
        "gradients": largest_error(plain.taken.grads, proxy.grads),
        "running statistics": largest_error(plain.taken.buffers, of_model(case, proxy.buffers)),
    }
    row["noise"] = 0.0 if plain.is_double else noise(case, plain)
    tolerance, terms = max(TOLERANCE[precision], NOISES * row["noise"]), flat(proxy.terms)
    wrong = sum(wrong_signs(taken[form], steps[form], tolerance) for form in ("two passes", "drop-in") if form in taken)
    worst = max(error for of_form in errors.values() for error in of_form.values())
    row |= {"outcome": "compared" if worst <= tolerance and not wrong else "DIFFERS", "errors": errors}
    row["wrong_signs"] = wrong
    if dtype_of(case) is torch.float64:
        found = flat(taken["two passes"].stat_grads)
        zero = sum(int(((g != 0) & (g.abs() <= CANCELS * terms[name])).sum()) for name, g in found.items())
        row["cancelled"] = zero / sum(g.numel() for g in found.values())
    return row


def noise(case: Case, plain: Plain) -> float:
    """How far plain training's gradient moves if the inputs move by a rounding: boxes that scores choose are others."""
    nudged = map_tensors(lambda t: t * (1 + NUDGE) if t.is_floating_point() and t.dim() > 2 else t, case.batch[0])
    seeded()
    moved = plain_step(case._replace(batch=(nudged, case.batch[1]))).taken
    return largest_error(moved.grads, plain.taken.grads)


def definitions(case: Case, options: Options, taken: Mapping[str, Taken]) -> dict[str, Step]:
    """What the definition says about the step of every form."""
    settings: dict[str, Any] = {"epsilon": RADIUS, "groups": options.groups, "rows": options.rows, "exact": False}
    found: dict[str, Step] = {}
    for form, step in taken.items():
        same = [other for other in found if ("one" in other) == ("one" in form)]
        if same and same_shifts(step.perturbation, taken[same[0]].perturbation):
            found[form] = found[same[0]]
            continue
        seeded()
        delta = {name: Shift(*pair) for name, pair in step.perturbation.items()}
        arguments_ = (case.model, case.loss_fn, case.batch)
        if "one" in form:  # a loss that cannot be taken apart is one loss of all samples
            apart = "one pass" in taken
            found[form] = oracle_one_pass_step(*arguments_, delta, clean=CLEAN, apart=apart, **settings)
        else:
            found[form] = oracle_step(*arguments_, ratio=1.0, perturbation=delta, **settings)
    return found


# The forms of the library.


def most_of(case: Case) -> tuple[Options, dict[str, Taken], dict[str, str]]:
    """Take a step in all forms; where groups of samples are refused, say how rows belong to them, or take none."""
    refused: dict[str, str] = {}
    for options in (Options(), Options(rows="consecutive"), Options(groups=1)):
        taken, errors = all_forms(case, options)
        if "rows=" not in errors.get("two passes", ""):
            break
        refused["groups"] = refused.get("groups", errors["two passes"])
    return options, taken, refused | errors


def all_forms(case: Case, options: Options) -> tuple[dict[str, Taken], dict[str, str]]:
    """A step in every form, and the errors of those that refuse."""
    taken: dict[str, Taken] = {}
    refused: dict[str, str] = {}
    for form in FORMS:
        seeded()
        try:
            taken[form] = STEPS[form](case, options, taken)
        except ApartError as error:
            refused[form] = described(error)
            if form == "two passes":
                break
    return taken, refused


def functional(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The functional step."""
    step = make_apart_step(case.model, case.loss_fn, epsilon=RADIUS, groups=options.groups, rows=options.rows)
    out = step(*split_state(case.model), case.batch)
    return Taken(out.grads, of_model(case, out.buffers), out.stat_grads, out.perturbation)


def drop_in(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """Both passes of a loop with `backward()`."""
    apart = APART(copy.deepcopy(case.model), RADIUS, options.groups, rows=options.rows)
    for context in (apart.to_proxy, apart.to_adver):
        with context():
            (0.5 * loss_of(apart.model, case)).backward()
    return left_in(
        apart.model,
        {layer: Shift(*(2 * g for g in pair)) for layer, pair in apart.stat_grads.items()},
        apart.perturbation,
    )


def drop_in_one_pass(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The one pass of a loop with `backward()`, under random signs."""
    apart = APART(copy.deepcopy(case.model), RADIUS, options.groups, rows=options.rows)
    with apart.one_pass():
        # the signs are drawn by now; dropout draws what it draws elsewhere
        apart.model.register_forward_pre_hook(seeded)
        loss_of(apart.model, case).backward()
    return left_in(apart.model, {}, apart.perturbation)


def functional_one_pass(case: Case, options: Options, before: Mapping[str, Taken]) -> Taken:
    """The functional step of one pass, at the δ that the drop-in has drawn."""
    delta = before.get("one-pass drop-in", before["two passes"]).perturbation
    settings: dict[str, Any] = {"groups": options.groups, "rows": options.rows, "rule": sign_perturbation}
    step = make_one_pass_step(case.model, case.loss_fn, epsilon=RADIUS, **settings)
    out = step(*split_state(case.model), case.batch, delta)
    return Taken(out.grads, of_model(case, out.buffers), out.stat_grads, delta)


STEPS: dict[str, Callable[[Case, Options, Mapping[str, Taken]], Taken]] = {
    "two passes": functional,
    "drop-in": drop_in,
    "one-pass drop-in": drop_in_one_pass,
    "one pass": functional_one_pass,
}


class Dtypes(TorchDispatchMode):
    """Notes whether an operator made a tensor that is less precise than float64, and no constant."""

    is_double = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float16, torch.bfloat16) and out.dim():
            self.is_double = False
        return out


def plain_step(case: Case) -> Plain:
    """Train as everybody does."""
    seeded()
    model, dtypes = copy.deepcopy(case.model), Dtypes()
    with dtypes:
        loss = loss_of(model, case)
    loss.backward()
    return Plain(left_in(model), dtypes.is_double)


def loss_of(model: nn.Module, case: Case) -> Tensor:
    """A forward and the loss, on a batch of their own: they may work in place."""
    return case.loss_fn(call(model, fresh(case.batch[0])), fresh(case.batch[1]))


def left_in(model: nn.Module, *of_library: Mapping[str, Any]) -> Taken:
    """The gradients that `backward()` has left, zero where there are none, and the buffers after it."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained_parameters(model).items()}
    return Taken(grads, dict(model.named_buffers()), *of_library)


def of_model(case: Case, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a step, without the frozen parameters, which it returns with them."""
    return {name: buffers[name] for name, _ in case.model.named_buffers()}


# How far apart two steps are.


def errors_of(taken: Taken, step: Step) -> dict[str, float]:
    """How far a step is from the definition's."""
    found = {
        "gradients": largest_error(taken.grads, step.grads),
        "running statistics": largest_error(taken.buffers, {name: step.buffers[name] for name in taken.buffers}),
    }
    if taken.stat_grads:
        found["statistic gradients"] = largest_error(flat(taken.stat_grads), flat(step.stat_grads))
    return found


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of a tensor; infinite where names, shapes or integers differ, or a value is none."""
    if actual.keys() != expected.keys() or any(actual[name].shape != expected[name].shape for name in expected):
        return float("inf")
    real = {name for name, value in expected.items() if value.is_floating_point() or value.is_complex()}
    if not all(torch.equal(actual[name], expected[name]) for name in expected.keys() - real):
        return float("inf")
    pairs = {name: finite_parts(actual[name].detach(), expected[name].detach()) for name in real}
    norms = {name: value.norm().item() for name, (_, value) in pairs.items()}
    least = LEAST_NORM * max(norms.values(), default=0.0)
    errors = [
        (found - value).norm().item() / (max(norms[name], least) or 1.0) for name, (found, value) in pairs.items()
    ]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def finite_parts(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with zeros where one infinity is expected and found, such as the range of an observer without data."""
    same = (actual == expected) & expected.isinf()
    return actual.masked_fill(same, 0), expected.masked_fill(same, 0)


def wrong_signs(taken: Taken, step: Step, tolerance: float) -> int:
    """How many components of δ are not ε · sign(g), where the sign of g is no matter of rounding.

    That is where its terms do not cancel, and where it is more than `tolerance` of the layer's largest.
    """
    assert step.proxy is not None
    terms, found, wrong = flat(step.proxy.terms), flat(taken.perturbation), 0
    for name, g in flat(step.stat_grads).items():
        clear = (g.abs() > CLEAR * terms[name]) & (g.abs() > tolerance * g.abs().max())
        expected = torch.tensor(RADIUS, dtype=found[name].dtype) * g.sign()
        wrong += int((found[name] != expected.to(found[name].dtype))[clear].sum())
    return wrong


def flat(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """A tree by layer as one by layer and statistic."""
    return {f"{layer}.{kind}": part for layer, pair in tree.items() for kind, part in zip("μσ", pair, strict=True)}


def same_shifts(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two perturbations are the same."""
    return all(torch.equal(part, flat(other)[name]) for name, part in flat(one).items())


def seeded(*_: Any) -> None:
    """Begin all sources of random numbers again: dropout draws the same masks in every form."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same case in another precision."""
    batch = map_tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tuple(case.batch))
    model = copy.deepcopy(case.model).to(dtype)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):  # it takes a step of quantisation in single precision alone
            module.scale = module.scale.float()
    return case._replace(model=model, batch=batch)


def dtype_of(case: Case) -> torch.dtype:
    """The precision of a case."""
    return next(parameter.dtype for parameter in case.model.parameters() if parameter.is_floating_point())


def described(error: Exception) -> str:
    """Class and message of an error, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


# The page.

COMPARED = ["model", "module", "BN layers", *KINDS, "one pass", "settings", "zero but for rounding"]
TRIED = ["package", "models", "compared", "differ", "no batch norm", "refused", "others", "largest error"]
MARK = re.compile(r"(<!-- table: (?P<title>[^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """A summary; what was compared, by package; what was refused; and all others. Those without a line are left out."""
    refused = [[row["model"], form, error] for row in rows for form, error in row.get("refused", {}).items()]
    others = [row for row in rows if row["outcome"] not in ("compared", "DIFFERS", "refused")]
    made = {
        "what was tried": Table(TRIED, [tried(package, rows) for package in PACKAGES]),
        "refused": Table(["model", "form", "error"], refused),
        "not compared": Table(
            ["model", "module", "outcome", "reason"],
            [[row["model"], row["family"], row["outcome"], row.get("reason", "")] for row in others],
        ),
    }
    for package in PACKAGES:
        made[package] = Table(COMPARED, [line(row) for row in rows if row["package"] == package and "errors" in row])
    return made


def tried(package: str, rows: Sequence[Row]) -> list[str]:
    """How many models of a package there are of every outcome."""
    of_package = [row for row in rows if row["package"] == package]
    outcomes = Counter(row["outcome"] for row in of_package)
    named = [outcomes.pop(outcome, 0) for outcome in ("compared", "DIFFERS", "no batch norm", "refused")]
    errors = [worst(row, kind) for row in of_package if "errors" in row for kind in KINDS]
    largest = f"{max(errors, default=0.0):.0e}"
    return [package, *map(str, [len(of_package), *named, sum(outcomes.values())]), largest]


def line(row: Row) -> list[str]:
    """A model that was compared."""
    settings = [f"rows={row['rows']!r}"] * bool(row["rows"]) + ["one group"] * (row["groups"] == 1)
    settings += ["float32"] if row["float64"] else ["float32 inside"] * (row["precision"] == "float32")
    return [
        row["model"] + " **differs**" * (row["outcome"] == "DIFFERS"),
        row["family"],
        str(row["layers"]),
        *(f"{worst(row, kind):.0e}" for kind in KINDS),
        "refused" if "one pass" in row["refused"] else "yes",
        ", ".join(settings),
        f"{row['cancelled']:.1%}" if "cancelled" in row else "",
    ]


def worst(row: Row, kind: str) -> float:
    """The largest error of a kind, over all forms."""
    return max((float(of_form[kind]) for of_form in row["errors"].values() if kind in of_form), default=0.0)


def recorded() -> list[Row]:
    """What was recorded of every package."""
    paths = [RESULTS / f"zoo-cpu-{package}.json" for package in PACKAGES]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def rendered(page: str, results: Sequence[Row]) -> str:
    """A page with the tables of some results in the place of those between its marks; the text around them stays."""
    made = {title: str(table) for title, table in tables([row for each in results for row in each["rows"]]).items()}
    stopped = " (stopped before it had tried everything)"
    made["machine"] = "".join(
        f"- `{each['command']}` on {each['machine']}{stopped * (not each['complete'])}\n" for each in results
    )
    return MARK.sub(lambda found: found[1] + made[found["title"]] + found[3], page)


def measure(settings: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every model, one after the other."""
    torch.set_num_threads(settings.threads)
    for package in settings.packages:
        for entry in entries(package):
            if any(fnmatch(entry.name, pattern) for pattern in settings.models):
                row = row_of(entry, settings.limit)
                print(f"{package}: {entry.name}: {row['outcome']}", file=sys.stderr, flush=True)
                yield row
                gc.collect()


def main() -> None:
    """Compare models, or write the page."""
    parser = arguments(__doc__, out=RESULTS)
    parser.add_argument("--packages", nargs="+", default=PACKAGES, choices=PACKAGES)
    parser.add_argument("--models", nargs="+", default=["*"], help="names; * stands for anything")
    parser.add_argument("--limit", type=int, default=60, help="seconds of processor time that a model may take")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/zoo.md from what was recorded")
    settings = parser.parse_args()
    if settings.page:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), recorded()), encoding="utf-8")
        return
    rows = run(__file__, settings, measure, lambda rows: tables(rows)["what was tried"])
    sys.exit(any(row["outcome"] == "DIFFERS" for row in rows))


if __name__ == "__main__":
    main()
