"""`--protocol fast`: the same network, to rounding, and the same random numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from submission.distillation.convnet import ConvNet
from submission.tasks import load_task
from tests.paths import ROOT
from tests.tools.real_data import real_subset, real_test_images
from tools.scoring.fast import Arithmetic, make_forward, probe
from tools.scoring.training import Schedule, assess, train

CLASSES, SIZE, BATCH = 3, 16, 12  # as test_evaluate.py has them: what one compiles, torch keeps on disk for the other
LABELS = torch.arange(18) % CLASSES


def new_net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet(CLASSES, SIZE)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def arithmetic() -> Arithmetic:
    return probe(new_net(), BATCH)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("count", [BATCH, 3])
def test_logits_and_gradients(arithmetic: Arithmetic, bf16: bool, count: int) -> None:
    assert arithmetic.compiled, "there is no C++ compiler on this machine"
    plain, fast = new_net(), new_net()
    expected = plain(images(count))
    logits = make_forward(fast, BATCH, Arithmetic(compiled=True, bf16=bf16))(images(count))
    for one in (expected, logits):
        F.cross_entropy(one, LABELS[:count]).backward()  # type: ignore[no-untyped-call]
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits. Gradients feel it more, by the ReLUs that it turns over: 0.12 was seen, with or without
    # compilation. Whether that matters to a score is what the test at the end is for.
    assert (logits - expected).norm() < (0.02 if bf16 else 1e-5) * expected.norm()
    closeness = 0.2 if bf16 else 1e-4
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        # A convolution's bias does nothing before a norm: its gradient is rounding alone.
        scale = theirs.grad.norm() if theirs.grad.norm() > 1e-5 else plain.classifier.weight.norm()
        assert (ours.grad - theirs.grad).norm() < closeness * scale, name


def test_training_draws_the_same_random_numbers(arithmetic: Arithmetic) -> None:
    weights, numbers = [], []
    for fast in (False, True):
        net = new_net(2)
        forward = make_forward(net, BATCH, Arithmetic(arithmetic.compiled, bf16=False)) if fast else net
        train(net, images(18), LABELS, Schedule(epochs=3, batch_size=BATCH), forward=forward)
        weights.append(net.classifier.weight.detach())
        numbers.append(torch.rand(3))
    assert torch.equal(*numbers)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_one_compilation_serves_all_nets_of_a_shape(arithmetic: Arithmetic) -> None:
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3):
        make_forward(new_net(seed), BATCH, arithmetic)(images(seed + 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_without_a_compiler(tmp_path: Path) -> None:
    program = """
import torch
from submission.distillation.convnet import ConvNet
from tools.scoring.fast import make_forward, probe
net = ConvNet(3, 16)
arithmetic = probe(net, 4)
print(arithmetic.compiled, make_forward(net, 4, arithmetic)(torch.randn(2, 3, 16, 16)).shape)
"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    assert finished.stdout.strip() == "False torch.Size([2, 3])"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_both_protocols_score_alike() -> None:
    task = load_task("cifar100")
    training, labels = real_subset(task, ipc=10, seed=0), torch.arange(100).repeat_interleave(10)
    accuracies = []
    for fast in (False, True):
        found = []
        for seed in range(5):
            torch.manual_seed(seed)
            net = ConvNet(100, 32)
            forward = make_forward(net, 256, probe(net, 256)) if fast else net
            train(net, training, labels, Schedule(max_steps=60), forward=forward)
            found.append(assess(net, *real_test_images(task))[0].accuracy)
        accuracies.append(torch.tensor(found))
    official, fast_ones = accuracies
    print(f"official {official.tolist()}, fast {fast_ones.tolist()}")
    pooled = ((official.var() + fast_ones.var()) / 5).sqrt()
    assert (official.mean() - fast_ones.mean()).abs() < 2 * pooled
