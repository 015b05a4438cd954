"""The training loop: equal to the recorded runs, and to the reference's loop written plainly, draw for draw."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from submission.distillation import dsa
from submission.distillation.convnet import ConvNet
from tests.paths import ROOT
from tests.tools.golden import recorded
from tools.scoring.training import Measure, Schedule, assess, train

CLASSES, SIZE = 3, 16


@pytest.mark.parametrize("task", ["cifar100", "tinyimagenet"])
def test_as_recorded(task: str) -> None:
    golden = recorded()["training"][task]
    classes, size, ipc = golden["classes"], golden["size"], golden["ipc"]
    torch.manual_seed(11)
    prototypes = torch.randn(classes, 3, size, size)
    images = prototypes.repeat_interleave(ipc, 0)
    images = images + 0.5 * torch.randn_like(images)
    test_images = prototypes + 0.5 * torch.randn_like(prototypes)
    torch.manual_seed(0)
    net = ConvNet(classes, size)
    labels = torch.arange(classes).repeat_interleave(ipc)
    epochs = train(net, images, labels, Schedule(golden["Epoch"], batch_size=golden["batch_size"]))
    tested = assess(net, test_images, torch.arange(classes), golden["batch_size"])[0]
    # A processor sums in its own order, and rounding can turn an image whose two best classes are nearly level.
    for measure, (loss, accuracy) in zip(
        [*epochs, tested], [*golden["train_loss_acc"], golden["test_loss_acc"]], strict=True
    ):
        assert measure.loss == pytest.approx(loss, rel=1e-3)
        assert measure.accuracy == pytest.approx(accuracy, abs=1.01 / len(images))


def make_data(count: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    prototypes = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return prototypes[labels] + 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


def plain_run(
    images: torch.Tensor, labels: torch.Tensor, tests: tuple[torch.Tensor, torch.Tensor], epochs: int, batch_size: int
) -> tuple[ConvNet, list[Measure], Measure]:
    """A run as the organisers' description has it, without a thought for speed."""
    loader = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(*tests), batch_size, shuffle=True)
    net = ConvNet(CLASSES, SIZE)
    rate = 0.01
    optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=0.0005)
    measures = []
    for epoch in range(epochs + 1):
        loss_sum, right = 0.0, 0
        for inputs, targets in loader:
            logits = net(dsa.augment(inputs))
            loss = F.cross_entropy(logits, targets)
            loss_sum += loss.item() * len(targets)
            right += int((logits.argmax(1) == targets).sum())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        measures.append(Measure(loss_sum / len(images), right / len(images)))
        if epoch == epochs // 2 + 1:
            rate *= 0.1
            optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=0.0005)
    right = 0
    loss_sum = 0.0
    for inputs, targets in test_loader:
        logits = net(inputs)
        loss_sum += F.cross_entropy(logits, targets).item() * len(targets)
        right += int((logits.argmax(1) == targets).sum())
    return net, measures, Measure(loss_sum / len(tests[0]), right / len(tests[0]))


def test_successive_runs_equal_the_plain_loop() -> None:
    images, labels = make_data(20)
    tests = make_data(10, seed=6)
    torch.manual_seed(1)
    plain = [plain_run(images, labels, tests, epochs=4, batch_size=8) for _ in range(2)]
    torch.manual_seed(1)
    for plain_net, plain_measures, plain_tested in plain:
        net = ConvNet(CLASSES, SIZE)
        measures = train(net, images, labels, Schedule(4, batch_size=8))
        tested = assess(net, *tests, batch_size=8)[0]
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, plain_net.state_dict()[name], atol=1e-7, rtol=1e-5)
        for ours, theirs in zip([*measures, tested], [*plain_measures, plain_tested], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.accuracy == pytest.approx(theirs.accuracy)


def test_restart_forgets_the_momentum_and_lowers_the_rate() -> None:
    # One batch an epoch and 3 of 6 epochs gone at the restart: the first step after it is a tenth of a plain one.
    images, labels = make_data(6)
    weights = []
    torch.manual_seed(0)
    net = ConvNet(CLASSES, SIZE)
    weight = net.classifier.weight

    def look(step: int, measure: Measure) -> None:
        assert weight.grad is not None
        weights.append((weight.detach().clone(), weight.grad.clone()))

    train(net, images, labels, Schedule(epochs=5, max_steps=4), look)
    (_, _), (before, _), (after, gradient), (_, _) = weights
    torch.testing.assert_close(after, before - 0.001 * (gradient + 0.0005 * before), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "images", "steps", "restart"),
    [
        (Schedule(), 1000, 4004, 2008),  # the challenge: epochs 0 to 1000, restart after epoch 501
        (Schedule(), 1025, 5005, 2510),  # a last batch of one image
        (Schedule(epochs=6), 256, 7, 5),
        (Schedule(epochs=1), 256, 2, 2),
        (Schedule(max_steps=1200), 1000, 1200, 600),
        (Schedule(max_steps=1), 1000, 1, 0),
        (Schedule(max_steps=4004), 1000, 4004, 2008),  # no shorter, so nothing changes
        (Schedule(max_steps=9999), 1000, 4004, 2008),
    ],
)
def test_schedule(schedule: Schedule, images: int, steps: int, restart: int) -> None:
    assert schedule.steps(images) == steps
    assert schedule.restart(images) == restart


def test_no_restart_where_its_epoch_is_never_reached() -> None:
    assert Schedule(epochs=0).restart(256) > Schedule(epochs=0).steps(256)


def test_stops_inside_an_epoch() -> None:
    images, labels = make_data(20)
    seen = []
    torch.manual_seed(0)
    epochs = train(
        ConvNet(CLASSES, SIZE), images, labels, Schedule(max_steps=5, batch_size=8), lambda n, _: seen.append(n)
    )
    assert seen == [1, 2, 3, 4, 5]
    assert len(epochs) == 2


def test_half_precision_files_train_as_the_numbers_they_hold() -> None:
    images, labels = make_data(12)
    losses = []
    for stored in (images.half(), images.half().float()):
        torch.manual_seed(0)
        losses.append(train(ConvNet(CLASSES, SIZE), stored, labels, Schedule(epochs=2)))
    assert losses[0] == losses[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is asked to keep memory")
def test_freed_memory_is_kept() -> None:
    program = """
import resource, torch
from submission.machine.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
loose = faults()
keep_freed_memory()
faults()  # a few turns go by until no small thing lies at the end of the heap
print(loose, faults())
"""
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    loose, kept = map(int, output.split())
    assert kept < loose / 4
