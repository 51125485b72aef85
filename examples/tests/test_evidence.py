"""The evidence: what is chosen on validation data, which numbers are written, and the tables made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from experiments import report
from experiments.analysis import estimate, format_error, format_gain, holm, paired_difference
from experiments.evaluate import CORRUPTIONS, EVALUATION, SEVERITIES
from experiments.runs import FolderError
from scipy import stats
from test_report import epochs, method, read_table, write_run

RESULTS = Path(report.__file__).parents[1] / "results"
RADII = (0, 0.1, 0.3)
PLAIN = {0: 8.0, 1: 6.0, 2: 7.5, 3: 7.0}
TWO_PASSES = {0: 5.5, 1: 4.0, 2: 5.0, 3: 5.5}
ONE_PASS = {0: 6.0, 1: 4.5, 2: 5.0, 3: 5.0}


def write_measured(folder: Path, error: float, level: float | None = None, **options) -> Path:
    """A finished run and what was measured on it: figures that follow from `level`, by default the error."""
    level = error if level is None else level
    write_run(folder, error=error, **{"validation_error": error, **options})
    curve = [100 - level - 50 * radius for radius in RADII]
    content = {
        "test_error": error,
        "wrong": list(range(round(10 * error))),
        "test_samples": 1000,
        "exact_error": level + 1,
        "train_error": level,
        "train_loss": level / 10,
        "ece": level / 2,
        "radii": RADII,
        "random": curve,
        "adversarial": curve,
        "area": {"random": 90 - level, "adversarial": 80 - level},
        "corruptions": {name: [level + severity for severity in SEVERITIES] for name in CORRUPTIONS},
    }
    (folder / EVALUATION).write_text(json.dumps(content))
    return folder


def write_all(folder: Path, errors: dict[int, float], **options) -> list[Path]:
    first = len(list(folder.glob("*")))
    return [
        write_measured(folder / f"run{first + number}", error, seed=seed, **options)
        for number, (seed, error) in enumerate(errors.items())
    ]


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "runs"
    write_all(folder, PLAIN)
    return folder


@pytest.fixture
def grid(runs) -> Path:
    write_all(runs, TWO_PASSES, **method("apart"))
    write_all(runs, ONE_PASS, **method("one_pass"))
    return runs


def numbers_of(runs: Path) -> Path:
    return runs.parent / "evidence/digits-evidence.json"


def make(runs: Path, **options) -> dict[str, dict[str, str]]:
    """The table of errors, by label and column; beside it, that of what was measured."""
    flags = [f"--{name.replace('_', '-')}" for name in ("evaluate", "errors_only") if options.pop(name, False)]
    for name, value in options.items():
        flags += [f"--{name}", str(value)]
    report.evidence_main([str(runs), "--out", str(runs.parent / "evidence"), *flags])
    _, errors, *_ = re.split(r"^\*\*digits: .+\*\*$", report.section(numbers_of(runs)), flags=re.MULTILINE)
    return read_table(errors)


def withstood(runs: Path) -> dict[str, dict[str, str]]:
    make(runs)
    return read_table(report.section(numbers_of(runs)).partition("withstand**")[2])


def gain(first: dict[int, float], second: dict[int, float]) -> str:
    return format_gain(paired_difference(list(first.values()), list(second.values())))


# choice


def test_the_radius_of_the_lowest_mean_validation_error_is_chosen_whatever_the_test_error(runs):
    # Validation errors (6, 4), (2, 5) and (5, 4) have the means 5, 3.5 and 4.5; the smallest test error is another's.
    for epsilon, validation, test in ((0.05, (6, 4), 1), (0.1, (2, 5), 3), (0.2, (5, 4), 2)):
        for seed, error in enumerate(validation):
            folder = runs / f"apart{epsilon}-{seed}"
            write_measured(folder, test, seed=seed, validation_error=error, **method("apart", epsilon=epsilon))
    row = make(runs)["APART"]
    assert (row["chosen"], row["validation error %"], row["test error %"]) == ("ε 0.1", "3.50 ± 1.50", "3.00 ± 0.00")


def test_all_that_was_chosen_from_is_listed_with_its_validation_error(runs, capsys):
    for rho, validation in ((0.1, 6.5), (0.2, 6.25)):
        write_measured(runs / f"sam{rho}", 5, validation_error=validation, **method("sam", rho=rho))
    make(runs)
    assert "SAM: ρ 0.1: 6.50 (1); ρ 0.2: 6.25 (1)" in capsys.readouterr().out
    lines = report.section(numbers_of(runs)).partition("Chosen from")[2]
    assert "- SAM" in lines
    assert "- plain" not in lines, "there was nothing to choose"


def test_zero_radius_other_rules_and_other_lengths_are_methods_of_their_own(runs):
    for number, options in enumerate(
        (
            method("apart", epsilon=0),
            method("apart", epsilon=0.1),
            method("apart", epsilon=0.2),
            method("apart", epsilon=0.2, rule="random_sign"),
            method("one_pass", epsilon=0, rule="sign"),
            method("one_pass", epsilon=0.1),
            method("one_pass", epsilon=0.2, rule="sign"),
            {**method("one_pass", epsilon=0.1), **epochs(4)},
        )
    ):
        write_measured(runs / f"other{number}", 5, validation_error=number, **options)
    assert {label: row["chosen"].partition(" (")[0] for label, row in make(runs).items()} == {
        "plain": "",
        "zero radius": "ε 0",
        "APART": "ε 0.1",
        "APART, rule random_sign": "ε 0.2",
        "zero radius in one pass": "ε 0",
        "APART in one pass": "ε 0.1",
        "APART in one pass, rule sign": "ε 0.2",
        "APART in one pass, 2× epochs": "ε 0.1",
    }


def test_a_candidate_is_judged_by_all_seeds_that_it_has(runs):
    """On seed 0 alone, which both have, the first would be the better one."""
    for epsilon, errors in ((0.05, {0: 4, 1: 9}), (0.1, {0: 5, 2: 6})):
        for seed, error in errors.items():
            options = method("apart", epsilon=epsilon)
            write_measured(runs / f"{epsilon}-{seed}", 5, seed=seed, validation_error=error, **options)
    assert make(runs)["APART"]["chosen"].startswith("ε 0.1")


def test_what_a_search_has_dropped_is_not_chosen_for_the_luck_of_a_single_seed(runs):
    write_all(runs, {0: 5.0, 1: 6.0}, **method("apart", epsilon=0.05))
    write_all(runs, {0: 4.0}, **method("apart", epsilon=0.1))
    assert make(runs)["APART"]["chosen"].startswith("ε 0.05")


def test_a_choice_at_the_edge_of_what_was_tried_is_named_in_table_and_terminal(runs, capsys):
    for epsilon, validation in ((0.1, 6), (0.2, 5), (0.4, 4)):
        write_measured(runs / f"a{epsilon}", 5, validation_error=validation, **method("apart", epsilon=epsilon))
    assert make(runs)["APART"]["chosen"] == "ε 0.4 (at the edge: ε)"
    assert "warning: digits, APART: ε 0.4 of 0.1 to 0.4 is at the edge" in capsys.readouterr().out


def test_a_choice_inside_its_range_and_a_zero_that_nothing_lies_beyond_are_not_named(runs, capsys):
    for epsilon, validation in ((0.1, 6), (0.2, 3), (0.4, 5)):
        write_measured(runs / f"a{epsilon}", 5, validation_error=validation, **method("apart", epsilon=epsilon))
    for decay, error in ((0.0, 4), (0.1, 5)):
        write_all(runs, dict.fromkeys(PLAIN, error), training={"epochs": 2, "weight_decay": decay})
    table = make(runs)
    assert table["APART"]["chosen"] == "ε 0.2, weight decay 0.0005"
    assert table["plain"]["chosen"] == "weight decay 0"
    assert "is at the edge" not in capsys.readouterr().out


def test_groups_are_chosen_like_the_radius(runs):
    write_measured(runs / "a", 5, validation_error=4, **method("one_pass", epsilon=0.1, groups=4))
    write_measured(runs / "b", 5, validation_error=3, **method("one_pass", epsilon=0.2, groups=8))
    assert make(runs)["APART in one pass"]["chosen"].startswith("ε 0.2, groups 8")


def test_the_weight_decay_of_every_method_is_chosen_plain_training_included(tmp_path):
    runs = tmp_path / "runs"
    for decay, plain, other in ((0.001, 7, 4), (0.002, 5, 6), (0.004, 6, 5)):
        training = {"epochs": 2, "weight_decay": decay}
        write_all(runs, {0: plain, 1: plain + 1}, training=training)
        write_all(runs, {0: other, 1: other}, training=training, **method("one_pass"))
    table = make(runs)
    assert {label: row["chosen"] for label, row in table.items()} == {
        "plain": "weight decay 0.002",
        "APART in one pass": "ε 0.1, weight decay 0.001 (at the edge: weight decay)",
    }
    assert table["APART in one pass"]["gain"].strip("*") == gain({0: 5, 1: 6}, {0: 4, 1: 4})


# tables


def test_every_method_is_set_against_the_plain_training_that_validation_chose(grid):
    tuned = {0: 5.0, 1: 6.0, 2: 5.5, 3: 5.0}
    write_all(grid, tuned, training={"epochs": 2, "weight_decay": 0.01})
    write_all(grid, dict.fromkeys(PLAIN, 7.0), **method("plain", label_smoothing=0.1))
    table = make(grid)
    assert table["plain"]["chosen"] == "weight decay 0.01 (at the edge: weight decay)"
    assert table["plain"]["gain"] == ""
    assert table["APART in one pass"]["gain"].strip("*") == gain(tuned, ONE_PASS)
    assert table["plain, label smoothing"]["gain"].strip("*").startswith("-1.62")


def test_p_is_by_holms_procedure_over_the_rows_and_decides_what_is_bold(grid):
    table = make(grid)
    rivals = {"APART": TWO_PASSES, "APART in one pass": ONE_PASS}
    found = [paired_difference(list(PLAIN.values()), list(errors.values())) for errors in rivals.values()]
    for label, p in zip(rivals, holm(found), strict=True):
        assert float(table[label]["p, Holm"]) == pytest.approx(p, rel=0.05)  # two digits are written
        assert table[label]["gain"].startswith("**") == (p < 0.05)


def test_where_pairs_gain_nothing_the_interval_without_them_stands_beside(runs):
    against, along = {0: 5.0, 1: 7.0, 2: 5.5, 3: 6.0}, {0: 6.0, 1: 4.0, 2: 5.5, 3: 5.0}
    write_all(runs, against, **method("apart"))  # seeds correlate by −0.9
    write_all(runs, along, **method("one_pass"))
    table = make(runs)
    ends = stats.ttest_ind([*PLAIN.values()], [*against.values()], equal_var=False).confidence_interval()
    assert table["APART"]["without pairs"] == f"+1.25 [{ends.low:+.2f}, {ends.high:+.2f}]"
    assert table["APART in one pass"]["without pairs"] == ""


def test_measured_figures_are_means_over_seeds(runs):
    for seed, level in enumerate((4, 3, 3, 4)):
        write_measured(runs / f"one{seed}", 7, level, seed=seed, **method("one_pass"))
    table = withstood(runs)
    assert table["plain"]["ECE %"] == "3.56 ± 0.21"  # half the mean of PLAIN
    assert table["APART in one pass"]["area, random %"] == "86.50 ± 0.29"
    assert table["APART in one pass"]["area, adversarial %"] == "76.50 ± 0.29"
    assert table["APART in one pass"]["corruption error %"] == "6.50 ± 0.29"  # severities add 3 on average


def test_the_error_over_the_decay_is_that_of_the_best_candidate_at_each(runs, tmp_path):
    for decay, epsilon, error in ((0.001, 0.1, 6), (0.001, 0.2, 5), (0.002, 0.1, 4), (0.002, 0.2, 7), (0.004, 0.1, 6)):
        training = {"epochs": 2, "weight_decay": decay}
        write_all(runs, {0: error, 1: error + 1}, training=training, **method("one_pass", epsilon=epsilon))
    make(runs)
    entries = json.loads(numbers_of(runs).read_text(encoding="utf-8"))["groups"]
    curve = report.over_decays([entry for entry in entries if entry["method"] == "APART in one pass"])
    assert {decay: error.mean for decay, error in curve.items()} == {0.001: 5.5, 0.002: 4.5, 0.004: 6.5}
    report.appendix_main([str(tmp_path / "evidence"), "--picture", "digits"])
    assert (tmp_path / "evidence/decays.png").stat().st_size > 10_000


# evaluations


def test_what_was_not_measured_is_told_with_the_command_and_only_chosen_runs_count(grid):
    for epsilon, validation in ((0.2, 1), (0.3, 99)):
        for seed in PLAIN:
            folder = grid / f"more{epsilon}-{seed}"
            write_measured(folder, 5, seed=seed, validation_error=validation, **method("apart", epsilon=epsilon))
            if seed == 0:
                (folder / EVALUATION).unlink()
    with pytest.raises(FolderError) as caught:
        make(grid)
    assert "1 of 12 chosen runs on digits have not been measured" in str(caught.value)
    assert str(caught.value).endswith(f"\n  python -m experiments evaluate {grid}/more0.2-0")


def test_the_chosen_runs_are_measured_where_asked_for(grid, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "evaluate_all", lambda folders, options: asked.append((len(folders), options)))
    make(grid, evaluate=True, samples=7, processes=3)
    ((folders, options),) = asked
    assert (folders, options.samples, options.processes, options.again) == (12, 7, 3, False)


def test_errors_alone_need_no_measurement(grid):
    for evaluation in grid.glob(f"*/{EVALUATION}"):
        evaluation.unlink()
    assert make(grid, errors_only=True)["APART"]["gain"].strip("*") == gain(PLAIN, TWO_PASSES)
    assert "withstand" not in report.section(numbers_of(grid))


def test_runs_without_plain_training_are_refused(tmp_path):
    write_measured(tmp_path / "runs/a", 5, **method("apart"))
    with pytest.raises(FolderError, match="no plain training among the runs on digits"):
        make(tmp_path / "runs")


# what is written


def test_the_numbers_of_every_seed_are_written(grid):
    make(grid)
    entries = json.loads(numbers_of(grid).read_text(encoding="utf-8"))["groups"]
    (one,) = (entry for entry in entries if entry["method"] == "APART in one pass")
    assert one["is_chosen"]
    for figure, of in {"test error %": 1, "ECE %": 2, "training loss": 10}.items():
        assert one[figure] == {str(seed): error / of for seed, error in ONE_PASS.items()}
    assert one["fits %"] == {str(seed): 100 - error for seed, error in ONE_PASS.items()}
    assert make(grid)["APART in one pass"]["test error %"] == format_error(estimate(list(ONE_PASS.values())))


def test_the_appendix_is_what_the_numbers_beside_it_say(tmp_path):
    for path in (*RESULTS.glob("*-evidence.json"), *RESULTS.glob("*-budget.md")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report.appendix_main([str(tmp_path)])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (RESULTS / "README.md").read_text(encoding="utf-8")
