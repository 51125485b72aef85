"""Arms with equal budgets of tuning: `python -m experiments budget --data-dir cifar-10-batches-py --out runs/budget`.

The plan, with its rules of decision, is examples/results/PLAN.md.

    search   the same draws of learning rate and weight decay for every arm, and its own knobs    one split, one seed
    refine   each arm's best few with two seeds more
    test     each arm's lowest mean validation error, trained again                               fresh splits and seeds

Every finished run is a line of `--results`. The same command goes on where it was stopped, on any machine that has this
file; several may run side by side on one machine. What is tested is measured when every arm has been chosen.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from scipy.stats import qmc

from experiments import analysis
from experiments.analysis import ResultTable, bold, estimate, format_error, format_gain, markdown
from experiments.evaluate import Options as Measurement
from experiments.evaluate import evaluate_run, read_evaluation
from experiments.machine import environment
from experiments.methods import NonFiniteError
from experiments.runs import FolderError, RunError, is_finished, read_run
from experiments.train import parse, train

DIVERGED = 90.0  # the error in percent that counts for a run that was not finite: that of guessing one class of ten
NOTHING = 0.5  # points: an interval within ± of it is that of no effect
REFINE_SEEDS = (1, 2)
Line = Mapping[str, Any]
FIGURES: dict[str, Callable[[Line], float]] = {
    "test error %": lambda line: line["test_error"],
    "error on corrupted images %": lambda line: float(np.mean(list(line["corruptions"].values()))),
    "error by exact statistics %": lambda line: line["exact_error"],
    "accuracy, random shifts %": lambda line: line["area"]["random"],
    "accuracy, adversarial shifts %": lambda line: line["area"]["adversarial"],
    "training loss": lambda line: line["train_loss"],
    "training error %": lambda line: line["train_error"],
}
PRIMARY = tuple(FIGURES)[:2]


class Range(NamedTuple):
    """What a setting is drawn from: uniform, or uniform in the logarithm. A value below 0 becomes 0: it is off."""

    low: float
    high: float
    is_log: bool = True
    is_whole: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the range, to four digits."""
        value = self.low * (self.high / self.low) ** share if self.is_log else self.low + share * (self.high - self.low)
        return round(value) if self.is_whole else max(0.0, float(f"{value:.4g}"))


class Arm(NamedTuple):
    """A method, with what is tuned for it alone: at most two knobs."""

    options: str
    knobs: Mapping[str, Range]


class Study(NamedTuple):
    """What all arms share; of `shifted_samples` test images accuracies under shifts and corruptions are measured."""

    options: str
    shared: Mapping[str, Range]
    arms: Mapping[str, Arm]
    draws: int = 20
    test_splits: int = 8
    refined: int = 3
    shifted_samples: int = 10_000


def arms_of(epochs: int, groups: int, ghost_sizes: Range) -> dict[str, Arm]:
    """The arms, all of the same compute: two passes have half the epochs."""
    smoothing, dropout = Range(-0.2, 0.2, is_log=False), Range(-0.5, 0.5, is_log=False)
    once, twice = f"--epochs {epochs}", f"--epochs {epochs // 2}"
    return {
        "plain": Arm(f"--method plain {once}", {"label-smoothing": smoothing, "dropout": dropout}),
        "ghost_noise": Arm(f"--method ghost_noise {once}", {"ghost-size": ghost_sizes}),
        "one_pass": Arm(f"--method one_pass --groups {groups} {once}", {"epsilon": Range(0.05, 0.5)}),
        "apart": Arm(f"--method apart --groups {groups} {twice}", {"epsilon": Range(0.025, 0.4)}),
        "sam": Arm(f"--method sam {twice}", {"rho": Range(0.02, 0.5)}),
    }


_CIFAR = (
    "--data cifar10 --train-samples 5000 --validation-samples 10000 --model cifar_resnet --width 16 --schedule cosine "
    "--compile --channels-last --batch-size"
)
_DIGITS = "--data digits --schedule cosine --batch-size"
_DECAYS = Range(5e-4, 5e-2)
_LARGE = {"lr": Range(0.03, 0.6), "weight-decay": _DECAYS}
_SMALL = {"lr": Range(0.01, 0.3), "weight-decay": _DECAYS}
_FEW = Range(2, 16, is_whole=True)
_FINE = (
    "--data cifar10 --train-samples 1000 --validation-samples 2000 --test-samples 2000 --resize 48 --channels-last "
    "--model efficientnet_lite0_imagenet --schedule cosine --batch-size 32"
)
_SMALLER = {"lr": Range(1e-3, 0.1), "weight-decay": Range(1e-5, 1e-2)}
STUDIES = {
    "cifar10": Study(f"{_CIFAR} 128", _LARGE, arms_of(120, 4, Range(4, 64, is_whole=True))),
    "cifar10-batch16": Study(f"{_CIFAR} 16", _SMALL, arms_of(30, 2, _FEW), draws=12),
    "cifar10-batch8": Study(f"{_CIFAR} 8", _SMALL, arms_of(30, 2, _FEW), draws=12),
    "digits-batch16": Study(f"{_DIGITS} 16", _SMALL, arms_of(60, 2, _FEW), draws=12, test_splits=20),
    "digits-batch8": Study(f"{_DIGITS} 8", _SMALL, arms_of(30, 2, _FEW), draws=12, test_splits=20),
    "finetune": Study(_FINE, _SMALLER, arms_of(8, 4, _FEW), draws=8, refined=2, shifted_samples=0),
}


@dataclass(frozen=True)
class Options:
    """What is run."""

    study: str = "cifar10"  # which one.
    # of it; all have the same draws, so that one can be added later.
    arms: tuple[str, ...] = ("plain", "ghost_noise", "one_pass", "apart")
    data_dir: Path | None = None  # where its data lie, if they do not come with a package.
    out: Path = Path("runs/budget")  # folder of the run folders.
    results: Path | None = None  # file of the finished runs, a line each; OUT/results.jsonl where none is named.
    test_at_edge: tyro.conf.FlagCreatePairsOff[bool] = False  # test even what lies at the edge of its range.

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"there is no study {self.study!r}: choose one of {', '.join(STUDIES)}")
        known = STUDIES[self.study].arms
        if unknown := ", ".join(sorted(set(self.arms) - set(known))):
            raise ValueError(f"{self.study} has no arm {unknown}: choose of its arms {', '.join(known)}")

    @property
    def plan(self) -> Study:
        """The study."""
        return STUDIES[self.study]


class Trial(NamedTuple):
    """A run of the plan."""

    stage: str
    arm: str
    draw: int
    split: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.stage}-draw{self.draw:02d}-{self.arm}-split{self.split}-seed{self.seed}"


Results = dict[Trial, dict[str, Any]]


def shares_of(study: Study) -> list[list[float]]:
    """Where in its range each setting of each draw lies: a Latin hypercube, the same for all arms."""
    hypercube = qmc.LatinHypercube(d=4, rng=np.random.default_rng(0))
    return hypercube.random(study.draws).tolist()  # type: ignore[no-any-return]  # scipy has no types


def ranges_of(study: Study, arm: str) -> dict[str, Range]:
    """What the settings of an arm are drawn from, those that all arms share first."""
    return {**study.shared, **study.arms[arm].knobs}


def drawn(study: Study, arm: str, draw: int) -> dict[str, float]:
    """The settings of a draw."""
    pairs = zip(ranges_of(study, arm).items(), shares_of(study)[draw], strict=False)
    return {name: each.at(share) for (name, each), share in pairs}


def arguments(options: Options, trial: Trial) -> list[str]:
    """The command line of a run, as train takes it."""
    values: dict[str, Any] = {"data-dir": options.data_dir} if options.data_dir else {}
    values |= drawn(options.plan, trial.arm, trial.draw) | {"split-seed": trial.split, "seed": trial.seed}
    values |= {"workers": 0, "evaluate-every": 10**6, "out": options.out / trial.name}
    command = f"{options.plan.options} {options.plan.arms[trial.arm].options}".split()
    return [*command, *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


def search(options: Options, _: Results) -> list[Trial]:
    """Every draw of every arm; all arms advance together, so that what has finished can be compared."""
    return [Trial("search", arm, draw, 0, 0) for draw in range(options.plan.draws) for arm in options.arms]


def refine(options: Options, results: Results) -> list[Trial]:
    """The best of each arm, with further seeds."""
    errors = [(line["validation_error"], trial) for trial, line in results.items() if trial.stage == "search"]
    ranked = {arm: [trial.draw for _, trial in sorted(errors) if trial.arm == arm] for arm in options.arms}
    places = range(options.plan.refined)
    orders = [(seed, place, arm) for seed in REFINE_SEEDS for place in places for arm in options.arms]
    return [Trial("refine", arm, ranked[arm][place], 0, seed) for seed, place, arm in orders]


def test(options: Options, results: Results) -> list[Trial]:
    """What each arm has chosen, on fresh splits and seeds."""
    chosen = {arm: choice(results, arm) for arm in options.arms}
    splits = range(1, 1 + options.plan.test_splits)
    return [Trial("test", arm, chosen[arm], split, 10 + split) for split in splits for arm in options.arms]


def choice(results: Results, arm: str) -> int:
    """The draw of the lowest mean validation error over search and refinement, among those that were refined."""
    errors: dict[int, list[float]] = {}
    for trial, line in results.items():
        if trial.arm == arm and trial.stage in ("search", "refine"):
            errors.setdefault(trial.draw, []).append(line["validation_error"])
    means = {draw: np.mean(each) for draw, each in errors.items() if len(each) == 1 + len(REFINE_SEEDS)}
    return min(sorted(means), key=lambda draw: float(means[draw]))


def edges(study: Study, arm: str, draw: int) -> list[str]:
    """Which settings of a draw are the smallest or largest of all draws, so that the best may lie beyond; not 0."""
    found = []
    for (name, each), share in zip(ranges_of(study, arm).items(), shares_of(study)[draw], strict=False):
        if share > 1 - 1 / study.draws or (share < 1 / study.draws and each.low > 0):
            found.append(f"{name} {each.at(share):g} of {each.low:g} to {each.high:g}")
    return found


def read_results(path: Path) -> Results:
    """The finished runs."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    stored = [json.loads(line) for line in lines if line.strip()]
    return {Trial(*(line[name] for name in Trial._fields)): line for line in stored}


def run(options: Options, trial: Trial, path: Path) -> None:
    """Train a run from where it stands, and add its line; a run that another process is at is left to it."""
    settings = parse(arguments(options, trial)).settings
    line = trial._asdict() | {"settings": drawn(options.plan, trial.arm, trial.draw)}
    try:
        train([settings], show=lambda _: None)
        found = read_run(settings.out, "validation")
        line |= {"validation_error": found.errors[settings.training.epochs], "train_loss": found.losses[-1]}
    except RunError as error:
        if "another process" not in str(error):
            raise
        return print(f"  {error}", flush=True)
    except NonFiniteError as error:
        line |= {"validation_error": DIVERGED, "diverged": str(error).splitlines()[0]}
    if trial.stage == "test" and not is_finished(settings.out):
        line |= {"test_error": DIVERGED, "exact_error": DIVERGED, "corruptions": {"all": [DIVERGED]}}
    elif trial.stage == "test":
        wanted = Measurement((settings.out,), samples=options.plan.shifted_samples, data_dir=options.data_dir)
        if problem := evaluate_run(settings.out, wanted):
            raise FolderError(f"{settings.out} could not be measured: {problem}")
        line |= read_evaluation(settings.out)
    line["machine"] = environment()
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str]) -> None:
    """Go on with a study."""
    options = tyro.cli(Options, args=argv, prog="python -m experiments budget", description=__doc__)
    path = options.results or options.out / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stage in (search, refine, test):
        if stage is test and not is_settled(options, read_results(path)):
            return
        trials = stage(options, read_results(path))
        for number, trial in enumerate(trials, start=1):
            if trial not in read_results(path):
                print(f"{number} of {len(trials)}: {trial.name}", flush=True)
                run(options, trial, path)
                write_tables(options, path)
        write_tables(options, path)
        if not set(trials) <= set(read_results(path)):
            return print("Other processes are at the last runs of this stage; go on when they have finished.")


def is_settled(options: Options, results: Results) -> bool:
    """Whether what was chosen can be tested; tells what each arm has chosen, and what lies at an edge."""
    at_edge = []
    for arm in options.arms:
        draw = choice(results, arm)
        found = [f"\n  at the edge: {each}" for each in edges(options.plan, arm, draw)]
        print(f"{arm}: draw {draw}, {drawn(options.plan, arm, draw)}{''.join(found)}")
        at_edge += found
    if at_edge and not options.test_at_edge:
        print("Extend the ranges as the plan says before anything is tested, or add --test-at-edge.")
    return not at_edge or options.test_at_edge


def write_tables(options: Options, path: Path) -> None:
    """Write what has been found so far beside the results, as Markdown; of tests nothing before all have finished."""
    results, study = read_results(path), options.plan
    lines, arms = list(results.values()), list(dict.fromkeys([*options.arms, *(trial.arm for trial in results)]))
    tables = [search_table(options.study, arms, lines)]
    tested = {(trial.arm, trial.split) for trial in results if trial.stage == "test"}
    if len(tested) == len(options.arms) * study.test_splits:
        tables += test_tables(options.study, options.arms, lines)
    else:
        planned = len(options.arms) * (study.draws + study.refined * len(REFINE_SEEDS) + study.test_splits)
        notes = f"{tables[0].notes} Under way: {len(results)} of {planned} runs have finished, and decide nothing yet."
        tables = [tables[0]._replace(notes=notes)]
    path.with_suffix(".md").write_text("\n".join(map(markdown, tables)), encoding="utf-8")


def decision(difference: analysis.PairedDifference, p: float) -> str:
    """What the plan concludes from the points by which one pass is below plain training, and p after Holm."""
    is_small = difference.low >= -NOTHING and difference.high <= NOTHING
    if p >= 0.05 or difference.low <= 0 <= difference.high:
        return "does nothing" if is_small else "not shown"
    return ("helps" if difference.low > 0 else "harms") + ", by less than half a point" * is_small


def search_table(study: str, arms: Sequence[str], lines: Sequence[Line]) -> ResultTable:
    """Validation errors of all draws that have begun; with refinement, their means over seeds."""
    errors: dict[tuple[int, str], list[float]] = {}
    for line in lines:
        if line["stage"] != "test":
            errors.setdefault((line["draw"], line["arm"]), []).append(line["validation_error"])
    means = {key: format_error(estimate(found)) for key, found in errors.items()}
    rows = [[str(draw), *(means.get((draw, arm), "") for arm in arms)] for draw in sorted({draw for draw, _ in errors})]
    notes = "Validation error in percent of each draw; a mean over three seeds, ± standard error, where it was refined."
    return ResultTable(f"{study}: search", ("draw", *arms), rows, notes)


def test_tables(study: str, arms: Sequence[str], lines: Sequence[Line]) -> list[ResultTable]:
    """What was tested, and the contrasts of every arm with plain training, of which two are primary."""
    tests: dict[str, dict[analysis.Key, Line]] = {arm: {} for arm in arms}
    for line in lines:
        if line["stage"] == "test" and line["arm"] in tests:
            tests[line["arm"]][line["split"], line["seed"]] = line
    found: dict[tuple[str, str], dict[analysis.Key, float]] = {}
    for arm, (name, figure) in itertools.product(arms, FIGURES.items()):
        with suppress(KeyError):  # it was not measured in this study
            found[arm, name] = {key: figure(line) for key, line in tests[arm].items()}
    names = [name for name in FIGURES if all((arm, name) in found for arm in arms)]
    means = [[arm, *(format_error(estimate(list(found[arm, name].values()))) for name in names)] for arm in arms]
    table = ResultTable(f"{study}: test", ("arm", *names), means, "Means over splits, ± standard error.")

    contrasts = [(arm, name) for arm in arms if arm != "plain" for name in names]
    differences = {
        (arm, name): analysis.difference_by_key(found["plain", name], found[arm, name]) for arm, name in contrasts
    }
    primary = [("one_pass", name) for name in PRIMARY if name in names]
    adjusted = dict(zip(primary, analysis.holm([differences[key] for key in primary]), strict=True))
    rows = []
    for (arm, name), difference in differences.items():
        assert difference is not None, "all arms have the same splits"
        p = adjusted.get((arm, name))
        without_pairs = analysis.welch_by_key(found["plain", name], found[arm, name])
        cells = [arm, name, format_gain(difference), format_gain(without_pairs)]
        cells += [_over_images(tests["plain"], tests[arm]) if name == PRIMARY[0] else ""]
        cells += ["", ""] if p is None else [f"{p:.2g}", decision(difference, p)]
        rows.append([bold(text, p is not None) for text in cells])
    columns = ("arm", "figure", "plain − arm", "without pairs", "over splits and test images", "p, Holm", "decision")
    notes = (
        "Student's 95 % interval over splits; positive is a lower figure than plain training's. In bold the "
        "primary contrasts, with the decision of the plan; all others decide nothing."
    )
    return [table, ResultTable(f"{study}: contrasts", columns, rows, notes)]


def _over_images(plain: Mapping[analysis.Key, Line], arm: Mapping[analysis.Key, Line]) -> str:
    """The interval of a difference in test error that speaks of other test images too."""
    if any("wrong" not in line for line in (*plain.values(), *arm.values())):
        return ""  # it diverged

    def wrong(line: Line) -> Any:
        return np.isin(np.arange(line["test_samples"]), line["wrong"]).astype(float)

    low, high = analysis.over_images([wrong(plain[key]) - wrong(arm[key]) for key in sorted(plain)])
    return f"[{low:+.2f}, {high:+.2f}]"
