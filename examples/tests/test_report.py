"""The report on finished runs: which runs are a row, what it is compared with, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from experiments import report
from experiments.__main__ import main as program
from experiments.analysis import difference_by_key, paired_difference
from experiments.runs import FolderError
from experiments.settings import (
    OWN_RULES,
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainingSettings,
    as_json,
)
from matplotlib.figure import Figure
from safetensors.torch import save_file

ENVIRONMENT = {"torch": "2.14.1", "hardware": "a processor"}
PLAIN = {0: 8.0, 1: 6.0, 2: 7.5}
TWICE = {0: 7.0, 1: 5.5, 2: 7.5}
APART = {0: 5.5, 1: 4.0, 2: 5.0}


def write_run(
    folder: Path, *, error=5.0, loss=0.01, validation_error=None, finished=True, seed=0, speed=100, **sections
) -> Path:
    """A run folder as train writes it. Two epochs of plain training, where `sections` do not say otherwise."""
    settings = Settings(
        data=DataSettings(**sections.get("data", {})),
        model=ModelSettings(**sections.get("model", {})),
        method=MethodSettings(**{"name": "plain", **sections.get("method", {})}),
        training=TrainingSettings(**{"epochs": 2, **sections.get("training", {})}),
        seed=seed,
        out=folder,
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**as_json(settings), "environment": ENVIRONMENT}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "train_loss", "validation_error", "test_error", "images_per_second", "data_wait"])
        for left in reversed(range(settings.training.epochs)):
            row = [settings.training.epochs - left, loss + left, validation_error, error + left]
            table.writerow([*row, speed, 0.5])
    if finished:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def method(name: str, **settings) -> dict[str, object]:
    rule = {"rule": OWN_RULES[name]} if name in OWN_RULES else {}
    return {"method": {"name": name, **rule, **settings}}


def epochs(count: int) -> dict[str, object]:
    return {"training": {"epochs": count}}


def write_runs(folder: Path, errors: dict[int, float], **sections) -> None:
    for seed, error in errors.items():
        write_run(folder / f"run{len(list(folder.glob('*')))}", seed=seed, error=error, **sections)


def make(runs: Path, **options) -> dict[str, dict[str, str]]:
    """Report on a folder and read the rows of the Markdown table, by label and column."""
    options = {"out": runs.parent / "report", **options}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    report.report_main([str(runs), *flags])
    return read_table(next(options["out"].glob("*.md")).read_text(encoding="utf-8"))


def read_table(markdown: str) -> dict[str, dict[str, str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in rows}


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


# rows


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_mean_and_standard_error(runs):
    write_runs(runs, {0: 5.0, 1: 6.0, 2: 7.0}, loss=0.0125)
    assert make(runs) == {
        "plain": {
            "runs": "3",
            "passes": "2",
            "time a step": "1.00 ×",
            "training loss": "0.0125",
            "error %": "6.00 ± 0.58",
            "gain on plain": "",
            "gain on plain, 2× epochs": "",
        }
    }


def test_a_label_is_made_of_what_differs(runs):
    write_run(runs / "a", **method("plain"))
    write_run(runs / "b", **method("plain"), **epochs(4))
    write_run(runs / "c", **method("plain"), **epochs(3))
    write_run(runs / "d", **method("apart", epsilon=0))
    write_run(runs / "e", **method("apart", epsilon=0.05))
    write_run(runs / "f", **method("apart", epsilon=0.1))
    write_run(runs / "g", **method("sam"))
    write_run(runs / "h", **method("apart_sam"), **epochs(4))
    assert list(make(runs)) == [
        "plain",
        "plain, 3 epochs",
        "plain, 2× epochs",
        "zero radius",
        "APART, ε 0.05",
        "APART, ε 0.1",
        "APART-SAM, ε 0.1, 2× epochs",
        "SAM",
    ]


def test_what_is_the_same_everywhere_is_in_no_label_but_in_the_notes(runs, tmp_path):
    write_run(runs / "a", **method("plain"), training={"epochs": 2, "lr": 0.3})
    write_run(runs / "b", **method("apart"), training={"epochs": 2, "lr": 0.3})
    assert list(make(runs)) == ["plain", "APART"]
    notes = (tmp_path / "report/digits-test.md").read_text(encoding="utf-8")
    for setting in ("lr 0.3", "ε 0.1", "model small_resnet", "torch 2.14.1, a processor"):
        assert setting in notes


@pytest.mark.parametrize(
    ("name", "foreign"), [("plain", "epsilon"), ("plain", "rho"), ("sam", "groups"), ("apart", "rho")]
)
def test_what_a_method_does_not_read_does_not_split_its_row(runs, name, foreign):
    write_run(runs / "a", seed=0, **method(name, **{foreign: 1}))
    write_run(runs / "b", seed=1, **method(name, **{foreign: 2}))
    (row,) = make(runs).values()
    assert row["runs"] == "2"


def test_where_the_data_lay_does_not_split_a_row(runs):
    write_run(runs / "a", seed=0, data={"name": "cifar10", "folder": Path("here")})
    write_run(runs / "b", seed=1, data={"name": "cifar10", "folder": Path("there")})
    assert list(make(runs)) == ["plain"]


def test_data_of_ones_own_is_told_apart_by_its_folder(runs):
    write_run(runs / "a", data={"name": "folder", "folder": Path("cats")})
    write_run(runs / "b", data={"name": "folder", "folder": Path("dogs")}, **method("apart"))
    rows = make(runs)
    assert list(rows) == ["plain, folder cats", "APART, folder dogs"]
    assert rows["APART, folder dogs"]["gain on plain"] == ""


def test_a_pass_is_forward_and_backward_over_the_data(runs):
    write_run(runs / "a", **method("plain"), **epochs(10))
    write_run(runs / "b", **method("apart", ratio=0.5), **epochs(10))
    write_run(runs / "c", **method("sam"), **epochs(10))
    write_run(runs / "d", **method("apart_sam", ratio=1.0), **epochs(10))
    assert [row["passes"] for row in make(runs).values()] == ["10", "15", "20", "20"]


# differences


@pytest.fixture
def grid(runs) -> Path:
    write_runs(runs, PLAIN)
    write_runs(runs, TWICE, **epochs(4))
    write_runs(runs, APART, **method("apart"))
    return runs


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    seeds = sorted(first.keys() & second.keys())
    found = paired_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds])
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def test_a_method_is_set_against_plain_training_and_against_twice_its_epochs(grid):
    row = make(grid)["APART"]
    assert row["gain on plain"].strip("*") == difference(PLAIN, APART)
    assert row["gain on plain, 2× epochs"].strip("*") == difference(TWICE, APART)


def test_every_row_is_set_against_plain_training_of_a_tuned_weight_decay_too(grid):
    tuned = {0: 5.0, 1: 4.5, 2: 5.5}
    write_runs(grid, tuned, training={"epochs": 2, "weight_decay": 0.01})
    rows = make(grid)
    column = "gain on plain, weight decay 0.01"
    assert rows["APART, weight decay 0.0005"][column].strip("*") == difference(tuned, APART)
    assert rows["plain, weight decay 0.0005"][column].strip("*") == difference(tuned, PLAIN)
    assert rows["plain, weight decay 0.01"][column] == ""


def test_longer_plain_training_is_set_against_the_shortest(grid):
    rows = make(grid)
    assert rows["plain, 2× epochs"]["gain on plain"] == difference(PLAIN, TWICE)
    assert rows["plain, 2× epochs"]["gain on plain, 2× epochs"] == ""
    assert rows["plain"]["gain on plain, 2× epochs"] == difference(TWICE, PLAIN)


def test_bold_is_what_is_clear_of_zero_by_holms_procedure_over_the_rows(grid):
    rows = make(grid)
    assert rows["APART"]["gain on plain"].startswith("**+2.33")
    assert "*" not in rows["plain, 2× epochs"]["gain on plain"]


def test_only_seeds_that_both_have_are_paired_and_their_number_is_told(runs):
    write_runs(runs, PLAIN)
    write_runs(runs, {1: 4.0, 2: 5.0, 7: 90.0}, **method("apart"))
    row = make(runs)["APART"]
    assert row["runs"] == "3"
    assert row["gain on plain"].strip("*") == difference(PLAIN, {1: 4.0, 2: 5.0}) + " (2 runs)"


def test_one_seed_has_a_difference_without_an_interval(runs):
    write_run(runs / "a", error=8)
    write_run(runs / "b", error=5.5, **method("apart"))
    row = make(runs)["APART"]
    assert (row["error %"], row["gain on plain"]) == ("5.50", "+2.50")


def test_over_several_splits_the_interval_is_that_of_their_means(runs):
    errors = {(split, seed): 8.0 + split + seed for split in (0, 1, 2) for seed in (0, 1)}
    better = {(split, seed): error - (1 + split) for (split, seed), error in errors.items()}
    for (split, seed), error in errors.items():
        write_run(runs / f"p{split}{seed}", seed=seed, error=error, data={"split_seed": split})
        write_run(
            runs / f"a{split}{seed}",
            seed=seed,
            error=better[split, seed],
            data={"split_seed": split},
            **method("apart"),
        )
    found = paired_difference([1.0, 2.0, 3.0], [0.0] * 3)
    row = make(runs)["APART"]
    assert row["runs"] == "6"
    assert row["gain on plain"] == f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert difference_by_key(errors, better) == found


def test_a_step_takes_as_long_as_it_does_beside_plain_training_without_waiting_for_data(runs):
    write_run(runs / "a", speed=200)
    write_run(runs / "b", speed=100, **method("apart"))
    assert make(runs)["APART"]["time a step"] == "2.00 ×"


def test_a_set_where_plain_training_has_not_converged_is_marked(runs, tmp_path):
    write_run(runs / "a", loss=0.5)
    make(runs)
    notes = (tmp_path / "report/digits-test.md").read_text(encoding="utf-8")
    assert "Plain training has not converged here** (training loss 0.500 after 2 epochs)" in notes


def test_plain_training_that_was_cut_short_on_purpose_is_not_said_to_lack_convergence(runs, tmp_path):
    write_run(runs / "a")
    write_run(runs / "b", **method("apart"))
    write_run(runs / "c", loss=0.5, **epochs(1))
    make(runs)
    notes = (tmp_path / "report/digits-test.md").read_text(encoding="utf-8")
    assert "not converged" not in notes
    assert "epochs 2" in notes


def test_parts_of_a_set_and_images_as_they_are_have_tables_of_their_own(runs, tmp_path):
    write_run(runs / "a", data={"name": "cifar10", "train_samples": 500})
    write_run(runs / "b", data={"name": "cifar10", "train_samples": 500, "augment": False})
    make(runs)
    found = {path.stem for path in (tmp_path / "report").glob("*.md")}
    assert found == {"cifar10-500-test", "cifar10-500-unaugmented-test"}


def test_an_out_that_is_a_file_is_refused_in_one_line(runs, tmp_path):
    write_run(runs / "a")
    (tmp_path / "file").touch()
    assert program(["report", str(runs), "--out", str(tmp_path / "file")]).startswith("error: ")


def test_loops_of_symbolic_links_end_and_a_run_behind_them_counts_once(runs):
    write_run(runs / "a")
    (runs / "again").symlink_to(runs)
    (runs / "a" / "up").symlink_to(runs / "a")
    assert make(runs)["plain"]["runs"] == "1"


def test_a_network_that_was_cut_short_is_none(runs, capsys):
    path = write_run(runs / "a") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FolderError, match="no finished run"):
        make(runs)
    assert "has not finished (no whole model.safetensors)" in capsys.readouterr().out


def test_seeds_in_common_with_none_leave_the_difference_open(runs):
    write_run(runs / "a", seed=0)
    write_run(runs / "b", seed=1, **method("apart"))
    assert make(runs)["APART"]["gain on plain"] == ""


def test_plain_training_of_another_network_is_no_pair(runs):
    for width in (8, 16):
        write_run(runs / f"plain{width}", model={"width": width}, error=width)
        write_run(runs / f"apart{width}", model={"width": width}, error=3, **method("apart"))
    rows = make(runs)
    assert rows["APART, width 8"]["gain on plain"] == "+5.00"
    assert rows["APART, width 16"]["gain on plain"] == "+13.00"


# what is written and read


def test_validation_errors_are_read_where_asked_for(runs, tmp_path):
    write_run(runs / "a", error=5, validation_error=9.25)
    assert make(runs, measure_on="validation")["plain"]["error %"] == "9.25"
    assert (tmp_path / "report/digits-validation.md").is_file()


def test_every_data_set_has_its_own_table_figure_and_errors(runs, tmp_path):
    write_run(runs / "a", seed=3, error=5)
    write_run(runs / "b", seed=3, error=6, data={"name": "mnist5k"}, **epochs(7))
    make(runs)
    for data, error in (("digits", 5), ("mnist5k", 6)):
        stem = tmp_path / "report" / f"{data}-test"
        assert list(read_table(stem.with_suffix(".md").read_text(encoding="utf-8"))) == ["plain"]
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        (group,) = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["groups"]
        assert group["errors"] == {"3": error}


def test_the_printed_table_says_what_the_written_one_says(grid, capsys):
    rows = make(grid)
    printed = capsys.readouterr().out
    for label, cells in rows.items():
        assert all(text.strip("*") in printed for text in (label, *cells.values()))


def test_the_curves_show_error_against_passes(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.update(lines_of(figure)))
    write_runs(runs, {0: 5.0, 1: 6.0}, **method("apart"))
    make(runs)
    assert drawn == {"APART": ([2, 4], [6.5, 5.5])}


def lines_of(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def test_unfinished_runs_and_other_folders_are_named_and_left_out(runs, capsys):
    write_run(runs / "a", seed=0)
    write_run(runs / "b", seed=1, finished=False)
    (runs / "notes").mkdir()
    report.report_main([*map(str, runs.iterdir()), "--out", str(runs.parent / "report")])
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"left out: {runs / 'b'} has not finished" in printed
    assert f"left out: {runs / 'notes'} is no run folder" in printed
    assert read_table((runs.parent / "report/digits-test.md").read_text(encoding="utf-8"))["plain"]["runs"] == "1"


def test_a_run_given_twice_counts_once(runs):
    write_run(runs / "a")
    report.report_main([str(runs), str(runs / "a"), "--out", str(runs.parent / "report")])
    assert read_table((runs.parent / "report/digits-test.md").read_text(encoding="utf-8"))["plain"]["runs"] == "1"


def test_two_runs_of_the_same_settings_and_seed_are_refused(runs):
    write_run(runs / "a", seed=4)
    write_run(runs / "b", seed=4)
    with pytest.raises(FolderError, match=r"runs/a and .*runs/b have the same settings, split and seed \(0, 4\)"):
        make(runs)


def test_a_missing_folder_is_named(runs):
    with pytest.raises(FolderError, match=r"runs does not exist: expected what was given .* as --out"):
        make(runs)


def test_nothing_finished_says_where_it_looked_and_for_what(runs):
    write_run(runs / "a", finished=False)
    with pytest.raises(FolderError, match=r"no finished run in .*runs: expected folders that train or sweep"):
        make(runs)


def test_an_error_that_was_not_measured_points_to_the_other_split(runs):
    write_run(runs / "a")
    with pytest.raises(FolderError, match=r"a/metrics.csv has no validation error .* --measure-on test"):
        make(runs, measure_on="validation")


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{"), ("config.json", "{}"), ("metrics.csv", "a,b\n1,2\n")]
)
def test_a_damaged_file_is_named(runs, name, content):
    (write_run(runs / "a") / name).write_text(content)
    with pytest.raises(FolderError, match=f"runs/a/{name} is not as train writes it .*: leave .*a out"):
        make(runs)
