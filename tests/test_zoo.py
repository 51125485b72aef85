"""The zoo: networks that people use, in every form of a step, against a definition that works for any model.

`make zoo` compares all of them; here are a few of each package, which differ in kind.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import agreement
import catalogue
import definition
import pytest
import torch
import torch.nn.functional as F
import zoo
import zoo_page
from agreement import FORMS, TOLERANCE, against_definition, largest_error, plain_step
from catalogue import Case, Entry
from oracle import oracle_one_pass_step, oracle_step
from small import convolutional, images
from torch import Tensor, nn

from apart_func import make_apart_step, split_state

SETTINGS = zoo.Settings()


def row_of(package: str, name: str) -> dict[str, Any]:
    """What the zoo says about a model."""
    pytest.importorskip(package)
    return zoo.row_of(entry(package, name), SETTINGS)


def entry(package: str, name: str) -> Entry:
    """A model, without a look through its package."""
    if package == "timm":
        return Entry(package, "", name, partial(catalogue.timm_case, name))
    if package == "transformers":
        return Entry(package, "", name, partial(catalogue.transformers_case, name, *catalogue.TRANSFORMERS[name]))
    if name.startswith("prepared"):
        name = name.partition(" ")[2]
        return Entry(package, "", name, partial(catalogue.quantisation_aware_case, name))
    from torchvision import models

    module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    return Entry(package, module, name, partial(catalogue.torchvision_case, name, module))


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("timm", "test_efficientnet"),  # norm-act layers, of which one has a dropout
        ("timm", "test_byobnet"),
        ("timm", "test_resnet"),  # activations in place
        ("torchvision", "shufflenet_v2_x0_5"),
        ("torchvision", "prepared quantized_shufflenet_v2_x0_5"),  # layers that read running statistics
        ("transformers", "RegNetForImageClassification"),  # keywords in, a mapping out
        ("transformers", "GroupViTModel"),  # two inputs
        ("transformers", "SegformerForSemanticSegmentation"),  # dropout behind batch norm
    ],
)
def test_all_forms_of_a_step_are_what_the_definition_says(package: str, name: str) -> None:
    row = row_of(package, name)
    assert row["outcome"] == "compared", row
    assert row["refused"] == {}
    assert set(row["errors"]) == {*FORMS, "plain training"}
    assert max(error for of_form in row["errors"].values() for error in of_form.values()) < TOLERANCE["float64"]


def test_a_detector_is_trained_by_all_forms_but_the_one_that_takes_its_loss_apart() -> None:
    row = row_of("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn")
    assert row["outcome"] == "compared", row
    assert set(row["refused"]) == {"one pass"}
    assert row["refused"]["one pass"].startswith("BatchError: the tensors of the model's output have lengths []")


def test_layers_that_see_tokens_are_refused_until_it_is_said_whose_they_are() -> None:
    row = row_of("transformers", "LevitForImageClassification")
    assert row["outcome"] == "compared", row
    assert "sees 128 rows of 8 samples" in row["refused"]["groups"]
    assert row["rows"] == "consecutive"


def test_a_model_without_batch_norm_is_named_and_not_counted() -> None:
    row = row_of("transformers", "ViTForImageClassification")
    assert row["outcome"] == "no batch norm"


# The comparison can fail.


def case() -> Case:
    return Case(convolutional(), images(), F.cross_entropy)


def test_a_form_that_takes_another_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = agreement.STEPS["drop-in"]

    def other(*arguments: Any) -> agreement.Taken:
        taken = honest(*arguments)
        return taken._replace(grads={name: grad * (1 + 1e-6) for name, grad in taken.grads.items()})

    assert against_definition(case(), plain_step(case()))["outcome"] == "compared"
    monkeypatch.setitem(agreement.STEPS, "drop-in", other)
    assert against_definition(case(), plain_step(case()))["outcome"] == "DIFFERS"


def test_a_perturbation_downhill_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def downhill(*arguments: Any, **options: Any) -> Any:
        def rule(stats: Any, grads: Any, epsilon: Tensor) -> Any:
            return {name: type(g)(-epsilon * g.mean.sign(), -epsilon * g.scale.sign()) for name, g in grads.items()}

        return make_apart_step(*arguments, **options, rule=rule)

    monkeypatch.setattr(agreement, "make_apart_step", downhill)
    row = against_definition(case(), plain_step(case()))
    assert row["outcome"] == "DIFFERS"
    assert row["wrong_signs"] == 2 * (4 + 5)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 0.0], [1.0, 0.0], 0.0),
        ([1.1, 0.0], [1.0, 0.0], 0.1),
        ([1.0, 1e-5], [1.0, 0.0], 0.1),  # of a ten-thousandth of the largest norm
        ([float("nan"), 0.0], [1.0, 0.0], float("inf")),
    ],
)
def test_the_error_is_that_of_the_worst_tensor(actual: list[float], expected: list[float], error: float) -> None:
    trees = ({str(i): torch.tensor([value]).double() for i, value in enumerate(tree)} for tree in (actual, expected))
    assert largest_error(*trees) == pytest.approx(error)


def test_integers_are_exact_and_names_the_same() -> None:
    assert largest_error({"a": torch.tensor(1)}, {"a": torch.tensor(2)}) == float("inf")
    assert largest_error({"a": torch.tensor(1.0)}, {"b": torch.tensor(1.0)}) == float("inf")


def test_a_model_that_takes_too_long_is_dropped() -> None:
    def endless() -> Case:
        while True:
            pass

    row = zoo.row_of(Entry("timm", "", "endless", endless), zoo.Settings(seconds=1))
    assert row["outcome"] == "too long"


# The definition.


def test_the_definition_for_any_model_is_that_of_the_tests() -> None:
    model, batch, groups = convolutional(), images(), definition.Groups(2, 8)
    delta = make_apart_step(model, F.cross_entropy, epsilon=0.1, groups=2)(*split_state(model), batch).perturbation
    options = {"epsilon": 0.1, "groups": 2}
    expected = oracle_step(model, F.cross_entropy, batch, ratio=1.0, perturbation=delta, **options)
    found = definition.two_passes(model, F.cross_entropy, batch, delta, groups)
    assert_same(found, expected)
    expected = oracle_one_pass_step(model, F.cross_entropy, batch, delta, clean=1, **options)
    assert_same(definition.one_pass(model, F.cross_entropy, batch, delta, groups, 1, apart=True), expected)


def assert_same(found: definition.Step, expected: Any) -> None:
    for field in ("loss", "adversarial_loss", "grads", "buffers"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-10, atol=1e-14)
    for layer, g in expected.stat_grads.items():
        torch.testing.assert_close(tuple(found.stat_grads[layer]), tuple(g), rtol=1e-10, atol=1e-14)


class Twice(nn.Module):
    """Batch norm whose output another batch norm shifts back: no shift of its mean changes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).tanh())


def test_statistic_gradients_that_are_zero_but_for_rounding_are_counted_and_do_nothing_alone() -> None:
    torch.manual_seed(0)
    model = catalogue.drawn(Twice()).double()
    batch = torch.randn(8, 4).double() + 1, torch.randint(3, (8,))
    twice = Case(model, batch, F.cross_entropy)
    row = against_definition(twice, plain_step(twice))
    assert row["cancelled"] == 4 / 16  # δμ of the first layer, of two shifts in each of two layers
    assert row["alone"] < 1e-12
    assert row["without"] > 1e-3  # where the second layer is perturbed in proportion to its mean, that mean matters


# The page.


def test_the_page_shows_what_was_recorded() -> None:
    settings = zoo_page.Settings()
    page = settings.page.read_text(encoding="utf-8")
    content = json.loads(settings.results.read_text(encoding="utf-8"))
    assert content["complete"]
    assert not [row["model"] for row in content["rows"] if row["outcome"] == "DIFFERS"]
    assert zoo_page.rendered(page, content) == page
    assert page.count("<!-- table: ") == page.count("<!-- end -->") == len(zoo.sheets(content)) + 1
