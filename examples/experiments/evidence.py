"""Methods with what validation data choose: `python -m experiments evidence runs/* --evaluate`.

Where a method was trained at several radii, sizes or weight decays, that of the lowest validation error is chosen; test
data have no part in it. Only what was chosen is measured by `evaluate`. The numbers of every seed are written, a file
for each data set, and `appendix` makes the tables of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from experiments import report
from experiments.appendix import CHOSEN, chosen_of, edges_of, section
from experiments.evaluate import EVALUATION, evaluate_all, read_evaluation
from experiments.evaluate import Options as Measurement
from experiments.report import Group, word
from experiments.runs import FolderError, find_finished, read_run
from experiments.tables import show

RADII = ("method.epsilon", "method.rho")  # are told even where there is one


@dataclass(frozen=True)
class Options:
    """What is compared."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, and folders of run folders.
    evaluate: tyro.conf.FlagCreatePairsOff[bool] = False  # first measure the chosen runs that have not been measured.
    errors_only: tyro.conf.FlagCreatePairsOff[bool] = False  # errors alone, for which no run need be measured.
    samples: int = Measurement.samples  # test samples that accuracies under a shift are then measured on, at most.
    processes: int = Measurement.processes  # that then measure at the same time, with one thread each.
    out: Path = Path("runs/evidence")  # folder for the numbers of every seed, a file named after each data set.


class Candidate(NamedTuple):
    """Runs that validation data may choose: what is written of them, and the runs."""

    entry: dict[str, Any]
    group: Group


def candidates_of(test: Sequence[Group], validation: Sequence[Group]) -> list[list[Candidate]]:
    """Groups by method: they differ in what is chosen alone. Zero radius and label smoothing make one of their own."""
    all_settings = [group.settings for group in test]
    varied, usual_epochs = report.varied_settings(all_settings), report.base_epochs(all_settings)
    told_apart = [name for name in varied if name not in CHOSEN]
    families: dict[str, list[Candidate]] = {}
    for group, validated in zip(test, validation, strict=True):
        settings = group.settings
        smoothed = bool(settings["method.label_smoothing"])
        rest = {name: value for name, value in settings.items() if name not in CHOSEN}
        key = json.dumps([rest, smoothed, report.has_zero_radius(settings)], sort_keys=True)
        told = [name for name in CHOSEN if name in settings and (name in RADII or name in varied)]
        told = [name for name in told if smoothed or name != "method.label_smoothing"]
        entry = {
            "method": report.label(settings, told_apart, usual_epochs) + ", label smoothing" * smoothed,
            "chosen": ", ".join(f"{word(name)} {settings[name]:g}" for name in told),
            "is_chosen": False,
            "passes": group.epochs * group.passes_per_epoch,
            "settings": settings,
            "at the edge": {},
            "validation error %": report.by_text(validated.errors),
            "test error %": report.by_text(group.errors),
        }
        families.setdefault(key, []).append(Candidate(entry, group))
    return list(families.values())


def choose(family: Sequence[Candidate]) -> Candidate:
    """Mark the candidate that validation data choose."""
    entries = [each.entry for each in family]
    best = chosen_of(entries)
    best |= {"is_chosen": True, "at the edge": edges_of(best["settings"], [each["settings"] for each in entries])}
    return next(each for each in family if each.entry is best)


def measured(group: Group) -> dict[str, dict[str, float]]:
    """What `evaluate` has found, by name, and by split and seed."""
    found = {key: read_evaluation(run.folder) for key, run in group.runs.items()}
    figures: dict[str, Callable[[Any], float]] = {
        "error by exact statistics %": lambda of: of["exact_error"],
        "fits %": lambda of: 100 - of["train_error"],
        "training loss": lambda of: of["train_loss"],
        "ECE %": lambda of: of["ece"],
        "area, random %": lambda of: of["area"]["random"],
        "area, adversarial %": lambda of: of["area"]["adversarial"],
        "corruption error %": lambda of: float(np.mean(list(of["corruptions"].values()))),
    }
    return {name: report.by_text({key: figure(of) for key, of in found.items()}) for name, figure in figures.items()}


def measure(data: str, chosen: Sequence[Candidate], options: Options) -> None:
    """See to it that the chosen runs have been measured, and add what was found."""
    folders = [run.folder for each in chosen for run in each.group.runs.values()]
    if options.evaluate:
        evaluate_all(folders, Measurement(tuple(folders), samples=options.samples, processes=options.processes))
    missing = [str(folder) for folder in folders if not (folder / EVALUATION).is_file()]
    if missing:
        raise FolderError(
            f"{len(missing)} of {len(folders)} chosen runs on {data} have not been measured (no {EVALUATION}): "
            f"--evaluate does it, and so does\n  python -m experiments evaluate {shlex.join(missing)}"
        )
    for each in chosen:
        each.entry.update(measured(each.group))


def write(data: str, test: Sequence[Group], validation: Sequence[Group], options: Options) -> None:
    """Choose, measure, write the numbers of one data set, and print their tables."""
    if not any(group.is_plain for group in test):
        raise FolderError(f"no plain training among the runs on {data}: expected what every method is set against")
    families = candidates_of(test, validation)
    chosen = [choose(family) for family in families]
    if not options.errors_only:
        measure(data, chosen, options)
    entries = [each.entry for family in families for each in family]
    content = json.dumps({"environment": report.machines_of(test), "groups": entries}, indent=2, ensure_ascii=False)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{data}-evidence.json"
    path.write_text(content + "\n", encoding="utf-8")
    show(section(path))
    print(f"Written: {path}")
    for entry in (each.entry for each in chosen):
        for name, edge in entry["at the edge"].items():
            print(f"warning: {data}, {entry['method']}: {name} {edge} is at the edge; the best may lie beyond")


def main(arguments: Sequence[str]) -> None:
    """Report on every data set among the runs."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments evidence", description=__doc__)
    folders = find_finished(options.folders)
    test, validation = (
        report.by_data(read_run(folder, split) for folder in folders) for split in ("test", "validation")
    )
    for data in test:
        write(data, report.group_runs(test[data]), report.group_runs(validation[data]), options)
