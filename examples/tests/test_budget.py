"""The experiment with equal budgets: its draws, what is refined and tested, and how it goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from experiments import budget
from experiments.analysis import PairedDifference, paired_difference
from experiments.budget import Arm, Options, Range, Study, Trial, choice, drawn, edges, read_results
from experiments.methods import NonFiniteError

PLAN = Path(budget.__file__).parents[1] / "results/PLAN.md"
CIFAR = budget.STUDIES["cifar10"]
ARMS = ("plain", "one_pass")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two arms on digits, four draws of one epoch, and two splits that test."""
    shared = {"lr": Range(0.03, 0.6), "weight-decay": Range(5e-4, 5e-2)}
    arms = {
        "plain": Arm("--method plain --epochs 1", {"dropout": Range(-0.5, 0.5, is_log=False)}),
        "one_pass": Arm("--method one_pass --groups 4 --epochs 1", {"epsilon": Range(0.05, 0.5)}),
    }
    found = Study("--data digits --train-samples 64 --validation-samples 64", shared, arms, 4, 2, shifted_samples=50)
    monkeypatch.setitem(budget.STUDIES, "small", found)
    return found


def options(folder: Path, **more: Any) -> Options:
    return Options("small", ARMS, out=folder, **more)


def write(folder: Path, errors: dict[Trial, float]) -> None:
    """Results as the program writes them."""
    lines = [json.dumps(trial._asdict() | {"validation_error": error}) for trial, error in errors.items()]
    (folder / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))


def start(folder: Path, *more: str) -> None:
    budget.main(["--study", "small", "--arms", *ARMS, "--out", str(folder), *more])


# draws


def test_the_draws_are_those_of_the_plan() -> None:
    rows = [
        line.strip("| ").split(" | ") for line in PLAN.read_text(encoding="utf-8").splitlines() if line[2:3].isdigit()
    ]
    rows = [row for row in rows if len(row) == 9]
    assert len(rows) == CIFAR.draws
    for draw, row in enumerate(rows):
        columns: dict[str, float] = {}
        for arm in CIFAR.arms:
            columns |= {f"{arm} {name}": value for name, value in drawn(CIFAR, arm, draw).items()}
        shared = [columns.pop(f"{arm} {name}") for arm in CIFAR.arms for name in ("lr", "weight-decay")]
        assert [float(cell) for cell in row] == [draw, *shared[:2], *columns.values()]
        assert shared == shared[:2] * len(CIFAR.arms)  # the same for all arms


def test_a_hypercube_has_one_draw_in_every_twentieth_of_a_range() -> None:
    for column in zip(*budget.shares_of(CIFAR), strict=True):
        assert sorted(int(20 * share) for share in column) == list(range(20))


def test_what_may_be_off_is_off_in_half_of_the_draws() -> None:
    off = [drawn(CIFAR, "plain", draw)["dropout"] == 0 for draw in range(CIFAR.draws)]
    assert sum(off) == CIFAR.draws / 2


# stages


def test_all_arms_advance_together(study: Study, tmp_path: Path) -> None:
    trials = budget.search(options(tmp_path), {})
    assert [(trial.draw, trial.arm) for trial in trials[:4]] == [
        (0, "plain"),
        (0, "one_pass"),
        (1, "plain"),
        (1, "one_pass"),
    ]


def test_the_best_three_are_refined_and_the_lowest_mean_is_chosen() -> None:
    """Draw 3 is the best of the search by luck, draw 0 the best of three seeds; draw 2 is not refined."""
    errors = {Trial("search", "plain", draw, 0, 0): error for draw, error in enumerate((30.0, 31.0, 40.0, 29.0))}
    results = {trial: {"validation_error": error} for trial, error in errors.items()}
    refined = budget.refine(Options("cifar10", ("plain",)), results)
    assert {trial.draw for trial in refined} == {0, 1, 3}
    assert {trial.seed for trial in refined} == set(budget.REFINE_SEEDS)
    results |= {trial: {"validation_error": {0: 30.0, 1: 31.0, 3: 33.0}[trial.draw]} for trial in refined}
    assert choice(results, "plain") == 0


def test_an_edge_is_the_smallest_or_largest_of_all_draws_and_zero_is_none() -> None:
    found = {draw: edges(CIFAR, "plain", draw) for draw in range(CIFAR.draws)}
    assert [draw for draw, at in found.items() if any("lr" in each for each in at)] == [14, 18]
    assert [draw for draw, at in found.items() if any("dropout" in each for each in at)] == [11]


def test_nothing_is_tested_while_a_choice_lies_at_an_edge(study: Study, tmp_path: Path, capsys: Any) -> None:
    assert edges(study, "plain", 3), "with four draws, most are at some edge"
    errors = {trial: float(trial.draw != 3) for trial in budget.search(options(tmp_path), {})}
    found = {trial: {"validation_error": error} for trial, error in errors.items()}
    errors |= {trial: float(trial.draw != 3) for trial in budget.refine(options(tmp_path), found)}
    write(tmp_path, errors)
    start(tmp_path)
    assert "at the edge: " in capsys.readouterr().out
    assert not [trial for trial in read_results(tmp_path / "results.jsonl") if trial.stage == "test"]


# runs


def test_a_study_runs_to_its_end_and_finished_runs_are_not_repeated(study: Study, tmp_path: Path, capsys: Any) -> None:
    start(tmp_path, "--test-at-edge")
    path = tmp_path / "results.jsonl"
    found = read_results(path)
    assert [sum(trial.stage == stage for trial in found) for stage in ("search", "refine", "test")] == [8, 12, 4]
    tested = next(line for trial, line in found.items() if trial.stage == "test")
    assert {"test_error", "exact_error", "train_loss", "corruptions", "area"} <= tested.keys()
    assert "test_error" not in next(iter(found.values()))
    content = path.read_text()
    start(tmp_path, "--test-at-edge")
    assert path.read_text() == content


def test_a_run_that_is_not_finite_counts_as_guessing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise NonFiniteError("the loss of step 3 is infinite")

    monkeypatch.setattr(budget, "train", diverge)
    trial = Trial("search", "plain", 0, 0, 0)
    budget.run(options(tmp_path), trial, tmp_path / "results.jsonl")
    (line,) = read_results(tmp_path / "results.jsonl").values()
    assert line["validation_error"] == budget.DIVERGED
    assert line["diverged"] == "the loss of step 3 is infinite"


def test_a_study_or_arm_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="no study 'svhn': choose one of cifar10"):
        Options("svhn")
    with pytest.raises(ValueError, match="cifar10 has no arm mixup: choose of its arms plain, ghost_noise"):
        Options("cifar10", ("mixup",))


# what is concluded


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.6, 1.4, 0.01, "helps"),
        (0.1, 0.4, 0.01, "helps, by less than half a point"),
        (0.1, 1.4, 0.06, "not shown"),  # one of two contrasts: Holm takes it back
        (-1.4, -0.6, 0.01, "harms"),
        (-0.4, 0.5, 0.9, "does nothing"),
        (-0.4, 0.6, 0.9, "not shown"),
    ],
)
def test_the_decision_is_that_of_the_plan(low: float, high: float, p: float, expected: str) -> None:
    assert budget.decision(PairedDifference((low + high) / 2, low, high), p) == expected


def comparisons_of(arm: str, errors: list[float], corrupted: list[float]) -> list[dict[str, Any]]:
    """Lines of an arm's tests, as the program writes them."""
    rest = {"stage": "test", "arm": arm, "exact_error": 1.0, "train_loss": 0.1, "train_error": 0.0, "test_samples": 100}
    return [
        rest
        | {"split": split, "seed": 10 + split, "test_error": error, "corruptions": {"blur": [worse]}}
        | {"area": {"random": 50.0, "adversarial": 40.0}, "wrong": list(range(round(error)))}
        for split, (error, worse) in enumerate(zip(errors, corrupted, strict=True), start=1)
    ]


def test_one_pass_is_set_against_plain_training_in_error_and_corruption_error() -> None:
    """Its errors are lower by 1.5 ± 0.29, its errors on corrupted images not told apart."""
    lines = comparisons_of("plain", [20, 21, 22, 23], [40, 41, 42, 43]) + comparisons_of(
        "one_pass", [19, 19, 21, 21], [44, 38, 42, 43]
    )
    _, contrasts = budget.test_tables("small", ARMS, lines)
    rows = {row[1].strip("*"): [cell.strip("*") for cell in row] for row in contrasts.rows}
    found = paired_difference([20.0, 21, 22, 23], [19.0, 19, 21, 21])
    error, corruption = (rows[name] for name in budget.PRIMARY)
    assert error[2] == f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert float(error[5]) == pytest.approx(2 * found.p, rel=0.1)  # the smaller of two, by Holm
    assert (error[6], corruption[6]) == ("helps", "not shown")
    assert not any(row[6] for name, row in rows.items() if name not in budget.PRIMARY)


def test_nothing_is_said_of_tests_before_all_have_finished(study: Study, tmp_path: Path) -> None:
    errors = dict.fromkeys(budget.search(options(tmp_path), {}), 30.0)
    write(tmp_path, errors | {Trial("test", "plain", 0, 1, 11): 1.0})
    budget.write_tables(options(tmp_path), tmp_path / "results.jsonl")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "9 of 24 runs have finished, and decide nothing yet" in text
    assert "small: test" not in text
