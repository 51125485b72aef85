"""The zoo: networks that people use, in every form of a step, against the definition.

`make zoo` compares all of them; here are a few of each package, which differ in kind.
"""

from typing import Any

import catalogue
import pytest
import torch
import torch.nn.functional as F
import zoo
from catalogue import Case, Entry, entry
from small import convolutional, images
from torch import Tensor, nn
from zoo import FORMS, against_definition, largest_error, plain_step

from apart_func import make_apart_step, sign_perturbation, split_state


def row_of(package: str, name: str) -> dict[str, Any]:
    pytest.importorskip(package)
    return zoo.row_of(entry(package, name), seconds=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("timm", "test_byobnet"),
        ("timm", "test_resnet"),  # activations in place
        ("timm", "test_efficientnet"),  # norm-act layers with dropout
        ("torchvision", "shufflenet_v2_x0_5"),
        ("transformers", "RegNetForImageClassification"),  # keywords in, a mapping out
        ("transformers", "GroupViTModel"),  # two inputs, and a loss that mixes samples
        ("transformers", "SegformerForSemanticSegmentation"),  # dropout behind batch norm
    ],
)
def test_all_forms_of_a_step_are_what_the_definition_says(package: str, name: str) -> None:
    row = row_of(package, name)
    assert row["outcome"] == "compared", row
    assert row["refused"] == {}
    assert set(row["errors"]) == {*FORMS, "plain training"}


def detector() -> Case:
    """A detector of torchvision with a small trunk, on images with boxes and labels as keywords."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 4))
    trunk.out_channels = 8
    made = FasterRCNN(
        trunk,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(8 * 9, 16),
        box_predictor=FastRCNNPredictor(16, 2),
    )
    batch = catalogue.detection_inputs(64, 4), torch.zeros(4)
    return Case(catalogue.drawn(catalogue.Detector(made)), batch, catalogue.sum_of_losses, 4)


def test_a_detector_is_trained_by_all_forms_but_the_one_that_takes_its_loss_apart() -> None:
    pytest.importorskip("torchvision")
    row = zoo.row_of(Entry("torchvision", "", "detector", detector), seconds=600)
    assert row["outcome"] == "compared", row
    assert set(row["refused"]) == {"one pass"}
    assert row["refused"]["one pass"].startswith("BatchError: the tensors of the model's output have lengths []")


@pytest.mark.slow
def test_layers_that_see_tokens_are_refused_until_it_is_said_whose_they_are() -> None:
    row = row_of("transformers", "LevitForImageClassification")
    assert row["outcome"] == "compared", row
    assert "sees 128 rows of 8 samples" in row["refused"]["groups"]
    assert row["rows"] == "consecutive"


def test_a_model_without_batch_norm_is_named_and_not_compared() -> None:
    without = Case(nn.Sequential(nn.Linear(2, 3)), (torch.randn(4, 2), torch.randint(3, (4,))), F.cross_entropy, 4)
    assert zoo.row_of(Entry("timm", "", "linear", lambda: without))["outcome"] == "no batch norm"


def test_a_model_that_takes_too_long_is_dropped() -> None:
    def endless() -> Case:
        while True:
            pass

    assert zoo.row_of(Entry("timm", "", "endless", endless), seconds=1)["outcome"] == "too long"


# The comparison can fail.


def case() -> Case:
    return Case(convolutional(), images(), F.cross_entropy)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_takes_another_step_is_found_out(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = zoo.STEPS[form]

    def other(*arguments: Any) -> zoo.Taken:
        taken = honest(*arguments)
        return taken._replace(grads={name: grad * (1 + 1e-6) for name, grad in taken.grads.items()})

    assert against_definition(case(), plain_step(case()))["outcome"] == "compared"
    monkeypatch.setitem(zoo.STEPS, form, other)
    assert against_definition(case(), plain_step(case()))["outcome"] == "DIFFERS"


def test_a_perturbation_downhill_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def downhill(*arguments: Any, **options: Any) -> Any:
        def rule(stats: Any, grads: Any, epsilon: Tensor) -> Any:
            return {name: type(g)(-epsilon * g.mean.sign(), -epsilon * g.scale.sign()) for name, g in grads.items()}

        return make_apart_step(*arguments, **options, rule=rule)

    monkeypatch.setattr(zoo, "make_apart_step", downhill)
    row = against_definition(case(), plain_step(case()))
    assert row["outcome"] == "DIFFERS"
    assert row["wrong_signs"] > 10  # of the 18 of two layers


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 0.0], [1.0, 0.0], 0.0),
        ([1.1, 0.0], [1.0, 0.0], 0.1),
        ([1.0, 1e-5], [1.0, 0.0], 0.1),  # of a ten-thousandth of the largest norm
        ([float("nan"), 0.0], [1.0, 0.0], float("inf")),
        ([float("inf"), 1.1], [float("inf"), 1.0], 0.1),  # an observer that has seen nothing
        ([float("-inf"), 1.0], [float("inf"), 1.0], float("inf")),
    ],
)
def test_the_error_is_that_of_the_worst_tensor(actual: list[float], expected: list[float], error: float) -> None:
    trees = ({str(i): torch.tensor([value]).double() for i, value in enumerate(tree)} for tree in (actual, expected))
    assert largest_error(*trees) == pytest.approx(error)


def test_integers_are_exact_and_names_the_same() -> None:
    assert largest_error({"a": torch.tensor(1)}, {"a": torch.tensor(2)}) == float("inf")
    assert largest_error({"a": torch.tensor(1.0)}, {"b": torch.tensor(1.0)}) == float("inf")


class Twice(nn.Module):
    """Batch norm whose output another one shifts back, behind a linear layer: no shift of its mean changes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.second = nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.mix(self.first(x))).tanh())


def twice(samples: int) -> Case:
    torch.manual_seed(0)
    batch = torch.randn(samples, 4).double() + 1, torch.randint(3, (samples,))
    return Case(catalogue.drawn(Twice()).double(), batch, F.cross_entropy)


def test_statistic_gradients_that_are_zero_but_for_rounding_are_counted() -> None:
    row = against_definition(twice(8), plain_step(twice(8)))
    assert 0 < row["cancelled"] <= 4 / 16  # δμ of the first layer; rounding may leave a zero


# The page.


def differing(case: Case, rule: Any) -> float:
    found = []
    for typed in (zoo.in_dtype(case, dtype) for dtype in (torch.float64, torch.float32)):
        step = make_apart_step(typed.model, typed.loss_fn, epsilon=0.1, rule=rule)
        shifts = zoo.flat(step(*split_state(typed.model), typed.batch).perturbation)
        found.append(torch.cat([shift.sign() for shift in shifts.values()]))
    return float((found[0] != found[1]).double().mean())


def test_the_rule_of_the_page_leaves_out_what_rounding_decides() -> None:
    names: dict[str, Any] = {}
    exec(zoo.PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0], names)
    assert differing(twice(64), sign_perturbation) > 0
    assert differing(twice(64), names["settled_signs"]) == 0


def test_the_page_shows_what_was_recorded_and_nothing_differs() -> None:
    page, results = zoo.PAGE.read_text(encoding="utf-8"), zoo.recorded()
    rows = [row for content in results for row in content["rows"]]
    assert {row["package"] for row in rows} == set(catalogue.PACKAGES)
    assert not [row["model"] for row in rows if row["outcome"] == "DIFFERS"]
    assert zoo.rendered(page, results) == page
    assert page.count("<!-- table: ") == page.count("<!-- end -->") == len(zoo.tables(rows)) + 1
