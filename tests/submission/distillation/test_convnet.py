"""The network: the reference's weights from the reference's seed, and the norm it is named for."""

import pytest
import torch

from submission.distillation.convnet import ConvNet
from tests.tools.golden import figures, recorded

SHAPES = {"cifar100": (100, 32), "tinyimagenet": (200, 64)}


@pytest.mark.parametrize("task", SHAPES)
def test_initialised_as_the_reference(task: str) -> None:
    golden = recorded()["convnet_init_seed0"][task]
    torch.manual_seed(0)
    net = ConvNet(*SHAPES[task])
    state = net.state_dict()
    assert set(state) == {name for name in golden if not name.startswith("_")}
    for name, tensor in state.items():
        assert figures(tensor) == pytest.approx(golden[name], rel=1e-9, abs=1e-6), name


@pytest.mark.parametrize("task", SHAPES)
def test_computes_as_the_reference(task: str) -> None:
    golden = recorded()["convnet_init_seed0"][task]
    classes, size = SHAPES[task]
    torch.manual_seed(0)
    net = ConvNet(classes, size)
    torch.manual_seed(3)
    logits = net(torch.randn(4, 3, size, size))
    assert figures(logits) == pytest.approx(golden["_logits_of_randn_seed3"], abs=1e-4)


@pytest.mark.parametrize(
    ("classes", "size", "parameters"), [(100, 32, 504_420), (200, 64, 1_938_120), (3, 20, 301_059)]
)
def test_shape_and_size(classes: int, size: int, parameters: int) -> None:
    net = ConvNet(classes, size)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_images_do_not_see_each_other() -> None:
    # Instance norm, so neither the batch nor the mode matters: an evaluator that used batch statistics would differ.
    net = ConvNet(10, 16)
    images = torch.randn(6, 3, 16, 16)
    together = net(images)
    torch.testing.assert_close(together[2:3], net.eval()(images[2:3]))


def test_brightness_and_contrast_of_the_whole_image_are_normalised_away() -> None:
    # True up to the zeros around the image, so look at what lies away from the border of a large one.
    torch.manual_seed(0)
    net = ConvNet(10, 64)
    normalised = net.features[:2](torch.randn(2, 3, 64, 64) * 5 + 1)
    torch.testing.assert_close(normalised.mean((2, 3)), torch.zeros(2, 128), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.var((2, 3), correction=0), torch.ones(2, 128), atol=1e-3, rtol=0)
