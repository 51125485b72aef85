"""What works with the torch that is installed: `python tests/torch_versions.py` prints a row; `make matrix` the table.

Every form of the step is compared with the definition and the golden cases where it is eager, and with the eager step
where it is transformed or compiled.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from forms import FORMS, grads_of, make
from small import convolutional, images

from apart_func import make_apart_step, split_state

ROOT = Path(__file__).parent.parent
EAGER = ("test_golden.py", "test_layer.py", "test_step.py")


def tests_pass() -> str:
    """The golden cases, the layer in all its forms, and what the step decides: how many tests pass of how many."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", *(f"tests/core/{name}" for name in EAGER)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", finished.stdout)}
    if set(counts) != {"passed"}:
        print(finished.stdout[-2000:], file=sys.stderr)
    return f"{counts.get('passed', 0)} of {sum(counts.values())}"


def forms_agree() -> None:
    """Two passes and the drop-in of them give one gradient, and so do both forms of one pass."""
    batch = images(16)
    two, one, drop_in, one_drop_in = (grads_of(make(form, convolutional())(batch)) for form in FORMS)
    for name in two:
        torch.testing.assert_close(two[name], drop_in[name])
        torch.testing.assert_close(one[name], one_drop_in[name])


def vmap_agrees() -> None:
    model, batch = convolutional(), images()
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy, groups=2)
    radii = torch.tensor([0.05, 0.2], dtype=torch.float64)
    mapped = torch.func.vmap(lambda e: step(params, buffers, batch, epsilon=e).adversarial_loss)(radii)
    alone = torch.stack([step(params, buffers, batch, epsilon=e).adversarial_loss for e in radii])
    torch.testing.assert_close(mapped, alone)


def grad_agrees() -> None:
    """The gradient of the proxy loss through a step is the gradient that the step returns without a radius."""
    model, batch = convolutional(), images()
    params, buffers = split_state(model)
    step = make_apart_step(model, F.cross_entropy, epsilon=0.0)
    through = torch.func.grad(lambda params: step(params, buffers, batch).loss)(params)
    for name, grad in step(params, buffers, batch).grads.items():
        torch.testing.assert_close(through[name], grad)


def compiled_agrees() -> None:
    model, batch = convolutional(dtype=torch.float32), images(dtype=torch.float32)
    step = make_apart_step(model, F.cross_entropy, groups=2)
    state = split_state(model)
    compiled = torch.compile(step, fullgraph=True)(*state, batch)
    for name, grad in step(*state, batch).grads.items():
        torch.testing.assert_close(compiled.grads[name], grad, rtol=1e-3, atol=1e-5)


def compiled_drop_in_agrees() -> None:
    batch, plain = images(16), convolutional()
    compiled = torch.compile(convolutional())
    found, expected = (grads_of(make("drop-in", model)(batch)) for model in (compiled, plain))
    for (_, grad), (_, wanted) in zip(sorted(found.items()), sorted(expected.items()), strict=True):
        torch.testing.assert_close(grad, wanted)


CHECKS: dict[str, Callable[[], str | None]] = {
    "tests": tests_pass,
    "both interfaces, one pass": forms_agree,
    "vmap": vmap_agrees,
    "grad": grad_agrees,
    "compile, functional": compiled_agrees,
    "compile, drop-in": compiled_drop_in_agrees,
}


def main() -> None:
    """Print a row, and on the error stream why a check failed."""
    torch.set_num_threads(1)
    cells = []
    for name, check in CHECKS.items():
        try:
            cells.append(check() or "✓")
        except Exception as error:  # any failure is a cell of the table
            cells.append(f"✗ {type(error).__name__}")
            print(f"{name}: {str(error)[-1500:]}", file=sys.stderr)
    python = ".".join(map(str, sys.version_info[:2]))
    if "header" in sys.argv:
        print(f"| torch | Python | {' | '.join(CHECKS)} |\n|{' --- |' * (len(CHECKS) + 2)}")
    print(f"| {torch.__version__.split('+')[0]} | {python} | {' | '.join(cells)} |")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
