"""The evidence: what is chosen on validation data, what it is set against, and which numbers are written."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from experiments import appendix, evaluate, evidence
from experiments.corruptions import CORRUPTIONS, SEVERITIES
from experiments.figures import format_error
from experiments.paired import estimate, holm, paired_difference, welch_difference
from experiments.runs import FolderError
from test_report import epochs, method, read_table, write_run

RESULTS = Path(evidence.__file__).parents[1] / "results"
RADII = (0, 0.1, 0.3)
SPLITS = ("test", "validation")
PLAIN = {0: 8.0, 1: 6.0, 2: 7.5, 3: 7.0}
TWICE = {0: 7.5, 1: 6.5, 2: 7.0, 3: 7.0}
TWO_PASSES = {0: 5.5, 1: 4.0, 2: 5.0, 3: 5.5}
ONE_PASS = {0: 6.0, 1: 4.5, 2: 5.0, 3: 5.0}
ONE_PASS_TWICE = {0: 5.0, 1: 4.5, 2: 4.5, 3: 4.0}


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
        "layers": {"stem.1": curve},
    }
    (folder / evaluate.EVALUATION).write_text(json.dumps(content))
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
    write_all(folder, TWICE, **epochs(4))
    return folder


@pytest.fixture
def grid(runs) -> Path:
    write_all(runs, TWO_PASSES, **method("apart"))
    write_all(runs, ONE_PASS, **method("one_pass"))
    write_all(runs, ONE_PASS_TWICE, **method("one_pass"), **epochs(4))
    return runs


def make(runs: Path, **options) -> dict[str, dict[str, dict[str, str]]]:
    """Report on a folder and read the tables of the Markdown by title, each by label and column."""
    flags = [f"--{name.replace('_', '-')}" for name in ("evaluate", "errors_only") if options.pop(name, False)]
    for name, value in options.items():
        flags += [f"--{name}", str(value)]
    evidence.main([str(runs), "--out", str(runs.parent / "evidence"), *flags])
    return read_tables(written(runs))


def written(runs: Path) -> str:
    return (runs.parent / "evidence/digits-evidence.md").read_text(encoding="utf-8")


def read_tables(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    _, *parts = re.split(r"^\*\*[\w-]+: (.+)\*\*$", markdown, flags=re.MULTILINE)
    return {title: read_table(part) for title, part in zip(parts[::2], parts[1::2], strict=True)}


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    found = paired_difference(list(first.values()), list(second.values()))
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


# choice


def test_the_radius_of_the_lowest_mean_validation_error_is_chosen_whatever_the_test_error(runs):
    # Validation errors (6, 4), (2, 5) and (5, 4) have the means 5, 3.5 and 4.5; the smallest test error is another's.
    for epsilon, validation, test in ((0.05, (6, 4), 1), (0.1, (2, 5), 3), (0.2, (5, 4), 2)):
        for seed, error in enumerate(validation):
            folder = runs / f"apart{epsilon}-{seed}"
            write_measured(folder, test, seed=seed, validation_error=error, **method("apart", epsilon=epsilon))
    tables = make(runs)
    assert tables["equal epochs"]["APART"]["chosen"] == "ε 0.1"
    assert tables["equal epochs"]["APART"]["test error %"] == "3.00 ± 0.00"


def test_all_radii_are_shown_with_both_errors_and_the_chosen_one_in_bold(runs):
    for rho, validation, test in ((0.1, 6.5, 5), (0.2, 6.25, 5.5)):
        options = method("sam", rho=rho)
        write_measured(runs / f"sam{rho}", test, validation_error=validation, **options)
    make(runs)
    lines = written(runs).partition("what was chosen from")[2].splitlines()
    assert "| SAM | ρ 0.1 | 1 | 6.50 | 5.00 |" in lines
    assert "| **SAM** | **ρ 0.2** | **1** | **6.25** | **5.50** |" in lines
    assert not any("plain |" in line for line in lines)  # there was nothing to choose


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
    tables = make(runs)
    chosen = {label: row["chosen"].partition(" (")[0] for label, row in tables["equal epochs"].items()}
    assert chosen == {
        "plain": "",
        "zero radius": "ε 0",
        "APART": "ε 0.1",
        "APART, rule random_sign": "ε 0.2",
        "zero radius in one pass": "ε 0",
        "APART in one pass": "ε 0.1",
        "APART in one pass, rule sign": "ε 0.2",
    }
    assert list(tables["equal compute"]) == [
        "plain, 2× epochs",
        "zero radius",
        "APART",
        "APART, rule random_sign",
        "APART in one pass, 2× epochs",
    ]


def test_a_candidate_is_judged_by_all_seeds_that_it_has(runs):
    """On seed 0 alone, which both have, the first would be the better one."""
    for epsilon, errors in ((0.05, {0: 4, 1: 9}), (0.1, {0: 5, 2: 6})):
        for seed, error in errors.items():
            options = method("apart", epsilon=epsilon)
            write_measured(runs / f"{epsilon}-{seed}", 5, seed=seed, validation_error=error, **options)
    assert make(runs)["equal epochs"]["APART"]["chosen"].startswith("ε 0.1")


def test_what_a_search_has_dropped_is_not_chosen_for_the_luck_of_a_single_seed(runs):
    write_all(runs, {0: 5.0, 1: 6.0}, **method("apart", epsilon=0.05))
    write_all(runs, {0: 4.0}, **method("apart", epsilon=0.1))
    assert make(runs)["equal epochs"]["APART"]["chosen"].startswith("ε 0.05")


def test_a_choice_at_the_edge_of_what_was_tried_is_named_in_table_and_terminal(runs, capsys):
    for epsilon, validation in ((0.1, 6), (0.2, 5), (0.4, 4)):
        write_measured(runs / f"a{epsilon}", 5, validation_error=validation, **method("apart", epsilon=epsilon))
    assert make(runs)["equal epochs"]["APART"]["chosen"] == "ε 0.4 (at the edge: ε)"
    assert "warning: digits, APART: ε 0.4 of 0.1 to 0.4 is at the edge" in capsys.readouterr().out


def test_a_choice_inside_its_range_and_a_zero_that_nothing_lies_beyond_are_not_named(runs, capsys):
    for epsilon, validation in ((0.1, 6), (0.2, 3), (0.4, 5)):
        write_measured(runs / f"a{epsilon}", 5, validation_error=validation, **method("apart", epsilon=epsilon))
    for decay, error in ((0.0, 4), (0.1, 5)):
        write_all(runs, dict.fromkeys(PLAIN, error), training={"epochs": 2, "weight_decay": decay})
    table = make(runs)["equal epochs"]
    assert table["APART"]["chosen"] == "ε 0.2"
    assert table["plain, tuned weight decay"]["chosen"] == "weight decay 0"
    assert "is at the edge" not in capsys.readouterr().out


def test_groups_are_chosen_like_the_radius(runs):
    write_measured(runs / "a", 5, validation_error=4, **method("one_pass", epsilon=0.1, groups=4))
    write_measured(runs / "b", 5, validation_error=3, **method("one_pass", epsilon=0.2, groups=8))
    assert make(runs)["equal epochs"]["APART in one pass"]["chosen"].startswith("ε 0.2, groups 8")


# comparison


def test_at_equal_epochs_plain_training_of_as_many_is_the_opponent(grid):
    table = make(grid)["equal epochs"]
    assert list(table) == ["plain", "APART", "APART in one pass"]
    assert [row["passes"] for row in table.values()] == ["2", "4", "2"]
    assert table["plain"]["gain on plain"] == ""
    assert table["APART"]["gain on plain"].strip("*") == difference(PLAIN, TWO_PASSES)
    assert table["APART in one pass"]["gain on plain"].strip("*") == difference(PLAIN, ONE_PASS)


def test_at_equal_compute_plain_training_of_twice_the_epochs_is_the_opponent(grid):
    table = make(grid)["equal compute"]
    assert list(table) == ["plain, 2× epochs", "APART", "APART in one pass, 2× epochs"]
    assert {row["passes"] for row in table.values()} == {"4"}
    gains = [row["gain on plain, 2× epochs"].strip("*") for row in table.values()]
    assert gains == ["", difference(TWICE, TWO_PASSES), difference(TWICE, ONE_PASS_TWICE)]


def test_plain_training_that_stopped_earlier_is_a_rival_at_equal_epochs(grid):
    write_all(grid, dict.fromkeys(PLAIN, 5.0), **epochs(1))
    table = make(grid)["equal epochs"]
    assert list(table) == ["plain, 1 epochs", "plain", "APART", "APART in one pass"]
    assert table["plain, 1 epochs"]["gain on plain"] == f"**{difference(PLAIN, dict.fromkeys(PLAIN, 5.0))}**"


def test_measured_figures_are_means_over_seeds_bold_where_they_differ_from_plain(runs):
    for seed, level in enumerate((4, 3, 3, 4)):
        write_measured(runs / f"one{seed}", 7, level, seed=seed, **method("one_pass"))
    table = make(runs)["equal epochs"]
    assert table["plain"]["ECE %"] == "3.56 ± 0.21"  # half the mean of PLAIN
    assert table["APART in one pass"]["ECE %"] == "**1.75 ± 0.14**"
    assert table["APART in one pass"]["area, random %"] == "**86.50 ± 0.29**"
    assert table["APART in one pass"]["area, adversarial %"] == "**76.50 ± 0.29**"
    assert table["APART in one pass"]["corruption error %"] == "**6.50 ± 0.29**"  # severities add 3 on average
    for seed, level in enumerate((9, 4, 8, 8)):
        write_measured(runs / f"apart{seed}", 7, level, seed=seed, **method("apart"))
    assert "*" not in make(runs)["equal epochs"]["APART"]["ECE %"]


def test_every_two_methods_are_compared_directly_over_seeds_and_over_images(grid):
    table = make(grid)["methods compared directly"]
    assert list(table) == ["plain against APART", "plain against APART in one pass", "APART against APART in one pass"]
    row = table["APART against APART in one pass"]
    over_seeds = row["difference in test error, over seeds"]
    assert over_seeds == difference(ONE_PASS, TWO_PASSES)
    low, high = (float(end) for end in re.search(r"\[(.*), (.*)\]", row["over seeds and test images"]).groups())
    assert low < 0.12 < high
    assert table["plain against APART"]["over seeds and test images"].startswith("-2.12 [")


def test_p_is_that_of_the_pairs_by_holms_procedure_over_the_rows_and_decides_what_is_bold(grid):
    table = make(grid)["methods compared directly"]
    pairs = {"plain against APART": (PLAIN, TWO_PASSES), "plain against APART in one pass": (PLAIN, ONE_PASS)}
    pairs["APART against APART in one pass"] = (TWO_PASSES, ONE_PASS)
    raw = [paired_difference(list(one.values()), list(other.values())).p for one, other in pairs.values()]
    for row, p in zip(table.values(), holm(raw), strict=True):
        assert float(row["p, Holm"]) == pytest.approx(p, rel=0.05)  # two digits are written
        assert row["difference in test error, over seeds"].startswith("**") == (p < 0.05)


def test_where_pairs_gain_nothing_the_interval_without_them_stands_beside(runs):
    against, along = {0: 5.0, 1: 7.0, 2: 5.5, 3: 6.0}, {0: 6.0, 1: 4.0, 2: 5.5, 3: 5.0}
    write_all(runs, against, **method("apart"))
    write_all(runs, along, **method("one_pass"))
    table = make(runs)["methods compared directly"]
    found = welch_difference(list(against.values()), list(PLAIN.values()))
    row = table["plain against APART"]  # seeds correlate by −0.9
    assert row["without pairs"] == f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert table["plain against APART in one pass"]["without pairs"] == ""


def test_smoothing_and_weight_decay_are_chosen_as_rivals_and_plain_training_stays_what_it_was(grid):
    for decay, error in ((1e-3, 5), (2e-3, 6)):
        write_all(grid, dict.fromkeys(PLAIN, error), training={"epochs": 2, "weight_decay": decay})
    for smoothing, error in ((0.1, 5), (0.2, 4)):
        write_all(grid, dict.fromkeys(PLAIN, error), **method("plain", label_smoothing=smoothing))
    table = make(grid)["equal epochs"]
    assert table["plain"]["test error %"].startswith("7.12")
    assert table["plain, tuned weight decay"]["chosen"] == "weight decay 0.001"
    assert table["plain, tuned weight decay"]["gain on plain"].strip("*").startswith("+2.12")
    assert table["plain, label smoothing"]["chosen"] == "label smoothing 0.2 (at the edge: label smoothing)"
    assert table["plain, label smoothing"]["gain on plain"].strip("*").startswith("+3.12")


def test_a_method_of_several_weight_decays_stays_what_it_was_and_is_a_rival_with_its_best(grid):
    for decay, error in ((1e-3, 3.0), (2e-3, 6.0)):
        write_all(
            grid, dict.fromkeys(PLAIN, error), training={"epochs": 2, "weight_decay": decay}, **method("one_pass")
        )
    table = make(grid)["equal epochs"]
    assert table["APART in one pass"]["test error %"].startswith("5.12")
    assert table["APART in one pass, tuned weight decay"]["chosen"] == "ε 0.1, weight decay 0.001"
    assert table["APART in one pass, tuned weight decay"]["gain on plain"].strip("*").startswith("+4.12")


def test_in_a_grid_of_decays_that_of_every_method_is_chosen_plain_training_included(tmp_path):
    runs = tmp_path / "runs"
    for decay, plain, other in ((0.001, 7, 4), (0.002, 5, 6), (0.004, 6, 5)):
        training = {"epochs": 2, "weight_decay": decay}
        write_all(runs, {0: plain, 1: plain + 1}, training=training)
        write_all(runs, {0: other, 1: other}, training=training, **method("one_pass"))
    table = make(runs)["equal epochs"]
    assert {label: row["chosen"] for label, row in table.items()} == {
        "plain": "weight decay 0.002",
        "APART in one pass": "ε 0.1, weight decay 0.001 (at the edge: weight decay)",
    }
    assert table["APART in one pass"]["gain on plain"].strip("*") == difference({0: 5, 1: 6}, {0: 4, 1: 4})


def test_the_error_over_the_decay_is_that_of_the_best_candidate_at_each_and_marks_what_was_chosen(runs, tmp_path):
    for decay, epsilon, error in ((0.001, 0.1, 6), (0.001, 0.2, 5), (0.002, 0.1, 4), (0.002, 0.2, 7), (0.004, 0.1, 6)):
        training = {"epochs": 2, "weight_decay": decay}
        write_all(runs, {0: error, 1: error + 1}, training=training, **method("one_pass", epsilon=epsilon))
    families = evidence.report(
        "digits",
        *(evidence.group_runs(map(partial(evidence.read_run, split=split), runs.iterdir())) for split in SPLITS),
        evidence.Options((runs,), out=tmp_path),
    )
    curves = {family.label: curve for family in families if (curve := evidence.decay_curve(family))}
    curve = curves["APART in one pass"]
    assert curve.decays == [0.001, 0.002, 0.004]
    assert curve.errors == [5.5, 4.5, 6.5]
    assert curve.chosen == 1


def test_a_picture_is_drawn_where_it_is_asked_for(grid, tmp_path):
    write_all(grid, PLAIN, training={"epochs": 2, "weight_decay": 0.01})
    make(grid, picture=tmp_path / "pictures/decays.png")
    assert (tmp_path / "pictures/decays.png").stat().st_size > 10_000


# evaluations


def test_what_was_not_measured_is_told_with_the_command_and_only_chosen_runs_count(grid):
    for epsilon, validation in ((0.2, 1), (0.3, 99)):
        for seed in PLAIN:
            folder = grid / f"more{epsilon}-{seed}"
            write_measured(folder, 5, seed=seed, validation_error=validation, **method("apart", epsilon=epsilon))
            if seed == 0:
                (folder / evaluate.EVALUATION).unlink()
    with pytest.raises(FolderError) as caught:
        make(grid)
    assert "1 of 20 chosen runs on digits have not been measured" in str(caught.value)
    assert str(caught.value).endswith(f"\n  python -m experiments evaluate {grid}/more0.2-0")


def test_the_chosen_runs_are_measured_where_asked_for(grid, monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "evaluate_all", lambda folders, options: asked.append((len(folders), options)))
    make(grid, evaluate=True, samples=7, processes=3)
    ((folders, options),) = asked
    assert (folders, options.samples, options.processes, options.again) == (20, 7, 3, False)


def test_errors_alone_need_no_measurement(grid):
    for evaluation in grid.glob(f"*/{evaluate.EVALUATION}"):
        evaluation.unlink()
    tables = make(grid, errors_only=True)
    assert tables["equal epochs"]["APART"]["gain on plain"] == f"**{difference(PLAIN, TWO_PASSES)}**"
    assert not set(evidence.MEASURED) & tables["equal epochs"]["APART"].keys()
    assert set(tables["methods compared directly"]["plain against APART"]) == set(evidence.PAIR_COLUMNS[1:])


def test_runs_without_plain_training_are_refused(tmp_path):
    write_measured(tmp_path / "runs/a", 5, **method("apart"))
    with pytest.raises(FolderError, match="no plain training among the runs on digits"):
        make(tmp_path / "runs")


# what is written


def test_the_numbers_of_every_seed_are_written(grid, tmp_path):
    make(grid)
    stem = tmp_path / "evidence/digits-evidence"
    check_numbers(stem.with_suffix(".json"))
    (one,) = (
        entry for entry in json.loads(stem.with_suffix(".json").read_text())["groups"]
        if entry["method"] == "APART in one pass"
    )  # fmt: skip
    assert one["test error %"] == {str(seed): error for seed, error in ONE_PASS.items()}
    assert one["ECE %"] == {str(seed): error / 2 for seed, error in ONE_PASS.items()}
    assert one["fits %"] == {str(seed): 100 - error for seed, error in ONE_PASS.items()}
    assert one["training loss"] == {str(seed): error / 10 for seed, error in ONE_PASS.items()}


def check_numbers(path: Path) -> None:
    """The means of the tables are those of the numbers beside them."""
    tables = read_tables(path.with_suffix(".md").read_text(encoding="utf-8"))
    entries = json.loads(path.read_text(encoding="utf-8"))["groups"]
    chosen = {entry["method"]: entry for entry in entries if entry["is_chosen"]}
    for title in ("equal epochs", "equal compute"):
        for label, row in tables[title].items():
            assert row["chosen"] == chosen[label]["chosen"]
            for name in ("test error %", *evidence.MEASURED):
                assert row[name].strip("*") == format_error(estimate(list(chosen[label][name].values())))


def test_the_appendix_is_what_the_numbers_beside_it_say(tmp_path):
    for path in RESULTS.glob("*-evidence.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    appendix.main([str(tmp_path)])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_appendix_sets_every_method_against_the_plain_training_that_validation_chose(grid, tmp_path):
    tuned = {0: 5.0, 1: 6.0, 2: 5.5, 3: 5.0}
    write_all(grid, tuned, training={"epochs": 2, "weight_decay": 0.01})
    make(grid)
    appendix.main([str(tmp_path / "evidence")])
    text = (tmp_path / "evidence/README.md").read_text(encoding="utf-8")
    table = read_table(text.partition("**digits: test error**")[2].partition("\n\n**")[0])
    assert table["plain, tuned weight decay"]["chosen"] == "weight decay 0.01 (at the edge: weight decay)"
    assert table["plain, tuned weight decay"]["gain"] == ""
    assert table["APART in one pass"]["gain"].strip("*") == difference(tuned, ONE_PASS)
    assert "| APART in one pass | 6.12 ± 0.31 |" in text.partition("withstand**")[2]  # the first figure measured there
