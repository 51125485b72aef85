"""Rows that are not samples: points, frames, tokens and nodes are grouped by the sample they belong to, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agree, functional_step, relative_error, take_step
from loops import drop_in_step, gradients, in_one_pass
from oracle import oracle_one_pass_step, oracle_step
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from apart_func import (
    APART,
    ApartError,
    BatchError,
    Perturbation,
    SettingError,
    init_perturbation,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    split_state,
)

SAMPLES, POINTS = 8, 3
NODES = torch.tensor([2, 5, 1, 3, 4, 2, 2, 6])  # of each sample, where they are not alike in number


class PointCloud(nn.Module):
    """Embeds points by themselves, and pools those of a sample; a norm on points, and one on samples."""

    def __init__(self, rows: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = rows
        self.embed, self.of_points, self.of_samples = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        for norm in (self.of_points, self.of_samples):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows == "uneven":
            pooled = self.of_nodes(x)
        elif self.rows == "interleaved":
            rows = self.embed(x.transpose(0, 1)).flatten(0, 1)
            pooled = self.of_points(rows).tanh().unflatten(0, (x.shape[1], x.shape[0])).mean(0)
        else:
            pooled = self.of_points(self.embed(x).flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1)
        return self.head(self.of_samples(pooled).tanh())

    def of_nodes(self, x: Tensor) -> Tensor:
        """As graph networks do it: the nodes of all samples in one tensor, and the sample of each in another."""
        counts = NODES[: len(x)]
        nodes = x[torch.arange(x.shape[1]) < counts[:, None]]
        y = self.of_points(self.embed(nodes)).tanh()
        sums = y.new_zeros(len(x), y.shape[1]).index_add(0, sample_of_nodes("of_points", nodes), y)
        return sums / counts[:, None]


def sample_of_nodes(layer: str, x: Tensor) -> Tensor:
    if layer == "of_samples":
        return torch.arange(len(x))
    return torch.arange(SAMPLES).repeat_interleave(NODES)[: len(x)]


def sample_of_points(layer: str, x: Tensor) -> Tensor:
    return torch.arange(len(x)) // (POINTS if layer == "of_points" else 1)


WAYS: dict[str, Any] = {
    "consecutive": "consecutive",
    "interleaved": "interleaved",
    "function": sample_of_points,
    "uneven": sample_of_nodes,
}
every_way = pytest.mark.parametrize("way", WAYS)


def clouds(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, int(NODES.max()), 4, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.arange(SAMPLES) % 3


def batch_for(way: str) -> tuple[Tensor, Tensor]:
    x, y = clouds()
    return (x if way == "uneven" else x[:, :POINTS]), y


def network(way: str) -> nn.Module:
    return PointCloud(way).double()


@every_way
@pytest.mark.parametrize("take", [functional_step, drop_in_step])
@pytest.mark.parametrize(("groups", "ratio"), [(0, 1.0), (2, 1.0), (4, 1.0), (0, 0.5), (2, 0.5)])
def test_a_step_groups_rows_by_sample_as_the_definition_says(way: str, groups: int, ratio: float, take: Any) -> None:
    options = {"epsilon": 0.2, "groups": groups, "ratio": ratio, "rows": WAYS[way]}
    assert_agree(take_step(network(way), batch_for(way), take, **options))


@every_way
def test_apart_sam_groups_rows_by_sample(way: str) -> None:
    options: dict[str, Any] = {"epsilon": 0.2, "groups": 4, "ratio": 1.0, "rho": 0.3, "rows": WAYS[way]}
    model, batch = network(way), batch_for(way)
    out = make_apart_sam_step(model, F.cross_entropy, **options)(*split_state(model), batch)
    expected = oracle_step(model, F.cross_entropy, batch, perturbation=out.perturbation, **options)
    assert relative_error(out.grads, expected.grads) < 1e-9


def far(model: nn.Module) -> dict[str, Perturbation]:
    zero = init_perturbation(model)
    return {name: Perturbation(shift.mean + 0.5, shift.scale - 0.5) for name, shift in zero.items()}


@every_way
def test_in_one_pass_the_clean_samples_do_not_know_of_the_others(way: str) -> None:
    model, (x, y) = network(way), batch_for(way)
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, groups=2, rows=WAYS[way])
    at_zero, shifted = (step(*split_state(model), (x, y), at) for at in (init_perturbation(model), far(model)))
    for field in ("loss", "stats", "stat_grads", "buffers"):
        torch.testing.assert_close(getattr(at_zero, field), getattr(shifted, field), rtol=1e-9, atol=1e-12)
    assert abs(at_zero.adversarial_loss - shifted.adversarial_loss) > 1e-3


@every_way
@pytest.mark.parametrize(("groups", "clean"), [(2, 1), (4, 3)])
def test_one_pass_groups_rows_by_sample_as_the_definition_says(way: str, groups: int, clean: int) -> None:
    model, batch = network(way), batch_for(way)
    options = {"epsilon": 0.2, "groups": groups, "rows": WAYS[way]}
    step = make_one_pass_step(model, F.cross_entropy, clean_fraction=clean / groups, **options)
    out = step(*split_state(model), batch, far(model))
    expected = oracle_one_pass_step(model, F.cross_entropy, batch, far(model), clean=clean, **options)
    for field in ("loss", "adversarial_loss", "stats", "stat_grads", "grads", "buffers"):
        assert relative_error(getattr(out, field), getattr(expected, field)) < 1e-9, field

    apart = APART(model, 0.2, groups, rows=WAYS[way])
    in_one_pass(apart, batch, clean / groups)
    drawn = oracle_one_pass_step(network(way), F.cross_entropy, batch, apart.perturbation, clean=clean, **options)
    assert relative_error(gradients(model), drawn.grads) < 1e-9
    assert relative_error(apart.stats, drawn.stats) < 1e-9
    assert relative_error(dict(model.named_buffers()), drawn.buffers) < 1e-9


@every_way
def test_rows_are_grouped_under_a_transform_as_eagerly(way: str) -> None:
    model, batch = network(way), batch_for(way)
    step = make_apart_step(model, F.cross_entropy, groups=2, rows=WAYS[way])
    eager = step(*split_state(model), batch)
    if way == "uneven":  # picks rows by a mask, which vmap cannot; over the radius it need not
        mapped = vmap(lambda e: step(*split_state(model), batch, epsilon=e))(torch.tensor([0.1], dtype=torch.float64))
    else:
        mapped = vmap(lambda x: step(*split_state(model), (x, batch[1])))(batch[0][None])
    found = tree_map(lambda t: t[0], mapped)
    torch.testing.assert_close(found._asdict(), eager._asdict(), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("way", ["consecutive", "function"])
def test_rows_are_grouped_in_one_compiled_graph(way: str) -> None:
    model, batch = network(way), batch_for(way)
    step = make_apart_step(model, F.cross_entropy, groups=4, rows=WAYS[way])
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    found, expected = (each(*split_state(model), batch) for each in (compiled, step))
    torch.testing.assert_close(found._asdict(), expected._asdict(), rtol=1e-8, atol=1e-12)


# Without a setting, and with one that is wrong.


def one_pass(model: nn.Module, batch: Any, **options: Any) -> Any:
    step = make_one_pass_step(model, F.cross_entropy, epsilon=0.1, **options)
    return step(*split_state(model), batch, init_perturbation(model))


FORMS: dict[str, Callable[..., Any]] = {
    "functional": functional_step,
    "one pass": one_pass,
    "drop-in": drop_in_step,
    "drop-in, one pass": lambda model, batch, **options: in_one_pass(APART(model, 0.1, **options), batch),
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@every_way
def test_without_a_setting_groups_of_rows_are_refused_by_the_layers_name(way: str, form: str) -> None:
    with pytest.raises(BatchError, match=r"layer 'of_points' sees \d+ rows of 8 samples.*rows='consecutive'"):
        FORMS[form](network(way), batch_for(way), groups=2)


@every_way
def test_without_a_setting_one_group_needs_none(way: str) -> None:
    assert_agree(take_step(network(way), batch_for(way), groups=1))


@every_form
def test_rows_that_are_no_multiple_of_the_samples_are_refused(form: str) -> None:
    with pytest.raises(BatchError, match=r"'of_points' sees 25 rows.*no multiple of the 8 samples.*rows=function"):
        FORMS[form](network("uneven"), batch_for("uneven"), groups=2, rows="consecutive")


@every_form
@pytest.mark.parametrize("rows", ["consecutive", "interleaved", sample_of_points])
def test_groups_that_divide_the_rows_and_not_the_samples_are_refused(form: str, rows: Any) -> None:
    with pytest.raises(BatchError, match="groups=3 does not divide the 8 samples"):
        FORMS[form](network("consecutive"), batch_for("consecutive"), groups=3, rows=rows)


@every_form
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda layer, x: list(range(len(x))), r"'of_points' returned list; expected.*int64 of shape \(24,\)"),
        (lambda layer, x: torch.arange(len(x)).double(), r"'of_points' returned torch.float64 \(24,\)"),
        (lambda layer, x: torch.arange(len(x) - 1), r"'of_points' returned torch.int64 \(23,\)"),
        (lambda layer, x: torch.arange(len(x)), r"'of_points' names samples outside of the batch of 8"),
        (lambda layer, x: torch.arange(len(x)) // 3 - 1, r"'of_points' names samples outside of the batch of 8"),
        (lambda layer, x: torch.arange(len(x)) // 3 + 1, r"'of_points' names samples outside of the batch of 8"),
        (lambda layer, x: 2 * (torch.arange(len(x)) // 6), r"'of_points' sees 0 values a channel in one of 2 groups"),
    ],
)
def test_a_function_that_names_no_samples_is_refused(form: str, rows: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        FORMS[form](network("consecutive"), batch_for("consecutive"), groups=2, rows=rows)


@pytest.mark.parametrize("rows", ["by sample", 3, True, ("consecutive",)])
def test_a_setting_that_is_not_valid_is_refused(rows: Any) -> None:
    model = network("consecutive")
    for make in (make_apart_step, make_one_pass_step):
        with pytest.raises(SettingError, match=r"rows=.*expected 'consecutive', 'interleaved', or a function"):
            make(model, F.cross_entropy, epsilon=0.1, groups=2, rows=rows)
    with pytest.raises(ApartError, match=r"rows=.*expected 'consecutive'"):
        APART(model, rows=rows)


def test_every_sample_can_be_a_group_where_it_has_several_rows() -> None:
    class OfPoints(PointCloud):
        def __init__(self, rows: str) -> None:
            super().__init__(rows)
            self.of_samples = nn.Identity()

    for way in ("consecutive", "interleaved", "function"):
        assert_agree(take_step(OfPoints(way).double(), batch_for(way), groups=-1, rows=WAYS[way]))


def test_the_order_in_turn_is_interleaved_by_its_old_name() -> None:
    old, new = (
        functional_step(network("interleaved"), batch_for("interleaved"), groups=2, rows=r)
        for r in ("in_turn", "interleaved")
    )
    torch.testing.assert_close(old._asdict(), new._asdict(), rtol=0, atol=0)


# A batch in chunks.


class Chunked(nn.Module):
    """Calls its layer once for every few samples, as models that spare memory do; the last rows may be left out."""

    def __init__(self, size: int, rows: int = SAMPLES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.size, self.rows = size, rows

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])
        seen = torch.cat([self.norm(chunk) for chunk in x[: self.rows].split(self.size)])
        return self.head(torch.cat([seen, x[self.rows :]]).tanh())


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("rows", [None, "interleaved", "in_turn", "consecutive"])
def test_a_layer_that_gets_the_batch_in_chunks_is_grouped_by_sample(size: int, rows: Any) -> None:
    """Group g of a chunk is its rows g, g + 2, …, with statistics of its own."""
    model, (x, y) = Chunked(size).double(), clouds()
    out = functional_step(model, (x, y), groups=2, epsilon=0.0, rows=rows)
    with torch.no_grad():
        seen = model.embed(x[:, 0]).unflatten(0, (-1, size // 2, 2))
    means = seen.mean(1).squeeze(0)  # (chunks, G, C), or (G, C) of one chunk
    torch.testing.assert_close(out.adversarial_stats["norm"].mean, means, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "rows", "seen"), [(4, 4, 4), (6, 8, 6)])
def test_chunks_that_are_not_all_of_the_batch_or_not_alike_are_refused(size: int, rows: int, seen: int) -> None:
    for form in FORMS.values():
        with pytest.raises(BatchError, match=rf"layer 'norm' sees {seen} rows of 8 samples"):
            form(Chunked(size, rows).double(), clouds(), groups=2)
