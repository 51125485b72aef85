"""The evidence: what is chosen on validation data, what it is set against, and which numbers are written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from experiments import evaluate, evidence
from experiments.corruptions import CORRUPTIONS, SEVERITIES
from experiments.groups import group_runs
from experiments.paired import Share, difference_by_seed, estimate, paired_share
from experiments.runs import FolderError, find_finished, read_run
from test_report import PAGE, epochs, method, read_table, write_run

RADII = (0, 0.1, 0.3)
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
    out = runs.parent / "evidence"
    evidence.main(evidence.Options((runs,), **{"out": out, **options}))
    return read_tables(written(runs))


def written(runs: Path) -> str:
    return (runs.parent / "evidence/digits-evidence.md").read_text(encoding="utf-8")


def read_tables(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    _, *parts = re.split(r"^\*\*\w+: (.+)\*\*$", markdown, flags=re.MULTILINE)
    return {title: read_table(part) for title, part in zip(parts[::2], parts[1::2], strict=True)}


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    found = difference_by_seed(first, second)
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Drawing takes longer than everything else; one test undoes this."""
    monkeypatch.setattr(evidence, "draw", lambda path, data, groups: None)


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
            method("one_pass", epsilon=0),
            method("one_pass", epsilon=0.1),
            {**method("one_pass", epsilon=0.1), **epochs(4)},
        )
    ):
        write_measured(runs / f"other{number}", 5, validation_error=number, **options)
    tables = make(runs)
    chosen = {label: row["chosen"] for label, row in tables["equal epochs"].items()}
    assert chosen == {
        "plain": "",
        "zero radius": "ε 0",
        "APART": "ε 0.1",
        "APART, rule random_sign": "ε 0.2",
        "zero radius in one pass": "ε 0",
        "APART in one pass": "ε 0.1",
    }
    assert list(tables["equal compute"]) == [
        "plain, 2× epochs",
        "zero radius",
        "APART",
        "APART, rule random_sign",
        "APART in one pass, 2× epochs",
    ]


def test_radii_are_compared_on_the_seeds_that_all_have(runs):
    write_measured(runs / "a0", 5, seed=0, validation_error=4, **method("apart", epsilon=0.05))
    write_measured(runs / "a1", 5, seed=1, validation_error=90, **method("apart", epsilon=0.05))
    write_measured(runs / "b0", 5, seed=0, validation_error=5, **method("apart", epsilon=0.1))
    assert make(runs)["equal epochs"]["APART"]["chosen"] == "ε 0.05"


def test_radii_without_a_seed_in_common_are_refused(runs):
    write_measured(runs / "a", 5, seed=0, **method("apart", epsilon=0.05))
    write_measured(runs / "b", 5, seed=1, **method("apart", epsilon=0.1))
    with pytest.raises(FolderError, match=r"APART: no radius can be chosen.* no seed was trained at all of them"):
        make(runs)


def test_groups_are_chosen_like_the_radius(runs):
    write_measured(runs / "a", 5, validation_error=4, **method("one_pass", epsilon=0.1, groups=4))
    write_measured(runs / "b", 5, validation_error=3, **method("one_pass", epsilon=0.2, groups=8))
    assert make(runs)["equal epochs"]["APART in one pass"]["chosen"] == "ε 0.2, groups 8"


# comparison


def test_at_equal_epochs_plain_training_of_as_many_is_the_opponent(grid):
    table = make(grid)["equal epochs"]
    assert list(table) == ["plain", "APART", "APART in one pass"]
    assert [row["passes"] for row in table.values()] == ["2", "4", "2"]
    assert table["plain"]["gain on plain"] == ""
    assert table["APART"]["gain on plain"] == f"**{difference(PLAIN, TWO_PASSES)}**"
    assert table["APART in one pass"]["gain on plain"] == f"**{difference(PLAIN, ONE_PASS)}**"


def test_at_equal_compute_plain_training_of_twice_the_epochs_is_the_opponent(grid):
    table = make(grid)["equal compute"]
    assert list(table) == ["plain, 2× epochs", "APART", "APART in one pass, 2× epochs"]
    assert {row["passes"] for row in table.values()} == {"4"}
    gains = [row["gain on plain, 2× epochs"].strip("*") for row in table.values()]
    assert gains == ["", difference(TWICE, TWO_PASSES), difference(TWICE, ONE_PASS_TWICE)]


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


# shares


def test_a_share_is_the_ratio_of_the_mean_gains_and_lies_in_its_interval():
    one = [PLAIN[seed] - ONE_PASS[seed] for seed in PLAIN]  # 2, 1.5, 2.5, 2
    two = [PLAIN[seed] - TWO_PASSES[seed] for seed in PLAIN]  # 2.5, 2, 2.5, 1.5
    share = paired_share(one, two)
    assert share.value == pytest.approx(8 / 8.5)
    assert min(np.divide(one, two)) <= share.low < share.value < share.high <= max(np.divide(one, two))
    assert paired_share(one, two) == share


def test_the_interval_of_a_share_is_that_of_the_ratio_where_seeds_are_many():
    generator = np.random.default_rng(1)
    two = generator.normal(2, 0.5, 400)
    one = 0.8 * two + generator.normal(0, 0.3, 400)
    share = paired_share(one.tolist(), two.tolist())
    deviation = np.std(one - share.value * two) / two.mean() / 400**0.5  # to first order
    assert share.low == pytest.approx(share.value - 1.96 * deviation, abs=0.2 * deviation)
    assert share.high == pytest.approx(share.value + 1.96 * deviation, abs=0.2 * deviation)


def test_pairs_count_in_a_share():
    two = [1.0, 2.0, 3.0, 2.0, 1.5, 2.5]
    one = [0.8, 1.7, 2.3, 1.7, 1.1, 2.1]
    paired, mixed = paired_share(one, two), paired_share(one[::-1][2:] + one[::-1][:2], two)
    assert paired.value == pytest.approx(mixed.value)
    assert paired.high - paired.low < 0.5 * (mixed.high - mixed.low)


@pytest.mark.parametrize("second", [[1.0, -1.0, 0.5], [2.0]])
def test_a_share_of_what_may_be_nothing_is_not_defined(second):
    assert paired_share([1.0] * len(second), second) is None


def test_a_seed_that_gains_nothing_leaves_a_share_defined():
    share = paired_share([0.5, 1.0, 0.9, 1.1, 1.0], [0.0, 1.0, 1.0, 1.1, 1.0])
    assert share.value == pytest.approx(4.5 / 4.1)
    assert math.isfinite(share.low)
    assert share.low < share.value < share.high


def test_each_table_says_what_one_pass_keeps_of_the_gain_of_two_over_plain_training_as_long(grid):
    make(grid)

    def share(plain: dict[int, float], one: dict[int, float]) -> Share:
        return paired_share(*([plain[seed] - other[seed] for seed in plain] for other in (one, TWO_PASSES)))

    for title, label, found in (
        ("equal epochs", "APART in one pass", share(PLAIN, ONE_PASS)),
        ("equal compute", "APART in one pass, 2× epochs", share(TWICE, ONE_PASS_TWICE)),
    ):
        kept = f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"
        part = written(grid).partition(title)[2].partition("**digits")[0]
        assert f"{label} keeps {kept} of the gain of two passes." in part


def test_where_two_passes_may_gain_nothing_the_page_says_so(runs):
    write_all(runs, {0: 9.0, 1: 5.0, 2: 8.5, 3: 6.0}, **method("apart"))
    write_all(runs, ONE_PASS, **method("one_pass"))
    make(runs)
    assert "What APART in one pass keeps is not defined: the gain of two passes may be zero." in written(runs)


def test_seeds_in_common_with_none_leave_the_share_open(runs):
    write_all(runs, TWO_PASSES, **method("apart"))
    write_measured(runs / "one", 5, seed=9, **method("one_pass"))
    assert make(runs)["equal epochs"]["APART in one pass"]["gain on plain"] == ""
    assert "APART in one pass keeps" not in written(runs)


# ways to carry the perturbation


def test_ways_to_carry_have_a_table_of_their_own_and_need_no_evaluation(grid):
    for folder in write_all(grid, {0: 6.5, 1: 4.5, 2: 6.0, 3: 6.0}, **method("one_pass", carry="average")):
        (folder / evaluate.EVALUATION).unlink()
    tables = make(grid)
    assert list(tables["equal epochs"]) == ["plain", "APART", "APART in one pass"]
    carried = tables["ways to carry the perturbation"]
    assert list(carried) == ["APART in one pass", "APART in one pass, carry average", "APART in one pass, 2× epochs"]
    row = carried["APART in one pass, carry average"]
    assert row["gain on plain of as many epochs"] == "**+1.38 [+0.98, +1.77]**"
    assert row["share of the gain of two passes"].startswith("**65 % [")  # 5.5 / 8.5
    assert carried["APART in one pass"]["share of the gain of two passes"].startswith("**94 % [")


def test_one_way_alone_has_no_such_table(grid):
    assert list(make(grid)) == ["equal epochs", "equal compute", "what was chosen from"]


# evaluations


def test_what_was_not_measured_is_told_with_the_command_and_only_chosen_runs_count(grid):
    for epsilon, validation in ((0.2, 1), (0.3, 99)):
        folder = grid / f"more{epsilon}"
        write_measured(folder, 5, seed=0, validation_error=validation, **method("apart", epsilon=epsilon))
        (folder / evaluate.EVALUATION).unlink()
    with pytest.raises(FolderError) as caught:
        make(grid)
    assert "1 of 17 chosen runs on digits have not been measured" in str(caught.value)
    assert str(caught.value).endswith(f"\n  python examples/evaluate.py {grid}/more0.2")


def test_the_chosen_runs_are_measured_where_asked_for(grid, monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "evaluate_all", lambda folders, options: asked.append((len(folders), options)))
    make(grid, evaluate=True, samples=7, workers=3)
    ((folders, options),) = asked
    assert (folders, options.samples, options.workers, options.again) == (20, 7, 3, False)


def test_runs_without_plain_training_are_refused(tmp_path):
    write_measured(tmp_path / "runs/a", 5, **method("apart"))
    with pytest.raises(FolderError, match="no plain training among the runs on digits"):
        make(tmp_path / "runs")


# what is written


def test_the_numbers_of_every_seed_the_figure_and_the_page_are_written(grid, tmp_path, monkeypatch):
    monkeypatch.undo()
    page = tmp_path / "page.md"
    page.write_text("<!-- digits-evidence -->\n<!-- end -->\n")
    make(grid, page=page)
    stem = tmp_path / "evidence/digits-evidence"
    assert written(grid) in page.read_text(encoding="utf-8")
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    check_numbers(stem.with_suffix(".json"))
    (one,) = (
        entry for entry in json.loads(stem.with_suffix(".json").read_text())["groups"]
        if entry["method"] == "APART in one pass"
    )  # fmt: skip
    assert one["test error %"] == {str(seed): error for seed, error in ONE_PASS.items()}
    assert one["ECE %"] == {str(seed): error / 2 for seed, error in ONE_PASS.items()}


def test_a_method_has_one_colour_and_a_dash_for_longer_training_and_for_zero_radius(grid):
    write_measured(grid / "zero", 6, **method("apart", epsilon=0))
    groups = group_runs(read_run(folder, "test") for folder in find_finished([grid]))
    lines = {group.label: style for group, style in zip(groups, evidence.line_styles(groups), strict=True)}
    shortest = {label: style for label, style in lines.items() if "2×" not in label}
    assert lines["plain"]["color"] == lines["plain, 2× epochs"]["color"]
    assert lines["zero radius"]["color"] == lines["APART, ε 0.1"]["color"]
    assert len({style["color"] for style in lines.values()}) == 3
    assert len({tuple(style.values()) for style in lines.values()}) == len(lines)
    assert [label for label, style in shortest.items() if style["linestyle"] != "-"] == ["zero radius"]


def check_numbers(path: Path) -> None:
    """The means of the tables are those of the numbers beside them."""
    tables = read_tables(path.with_suffix(".md").read_text(encoding="utf-8"))
    entries = json.loads(path.read_text(encoding="utf-8"))["groups"]
    chosen = {entry["method"]: entry for entry in entries if entry["is_chosen"]}
    for title in ("equal epochs", "equal compute"):
        for label, row in tables[title].items():
            assert row["chosen"] == chosen[label]["chosen"]
            for name in ("test error %", *evidence.MEASURED):
                found = estimate(list(chosen[label][name].values()))
                assert row[name].strip("*") == f"{found.mean:.2f} ± {found.standard_error:.2f}"


RESULTS = PAGE.parent / "results"


@pytest.mark.parametrize("table", sorted(RESULTS.glob("*-evidence.md")), ids=lambda path: path.stem)
def test_the_page_of_results_shows_the_tables_and_the_figure_as_they_were_written(table):
    page = PAGE.read_text(encoding="utf-8")
    assert table.read_text(encoding="utf-8") in page
    assert f"(results/{table.stem}.png)" in page
    assert table.with_suffix(".png").is_file()


@pytest.mark.parametrize("numbers", sorted(RESULTS.glob("*-evidence.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_page_follow_from_the_numbers_beside_them(numbers):
    check_numbers(numbers)
