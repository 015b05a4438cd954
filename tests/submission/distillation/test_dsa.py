"""The augmentation: equal to what the organisers' evaluator was recorded to do, and within the bounds it states."""

import math
from collections import Counter

import pytest
import torch

from submission.distillation import dsa
from tests.tools.golden import figures, recorded, recorded_operations

RECORDED_SEEDS = {"color": 100, "crop": 101, "cutout": 102, "flip": 103, "scale": 104, "rotate": 105}


@pytest.mark.parametrize("operation", dsa.OPERATIONS, ids=lambda operation: operation.__name__)
def test_operation_as_recorded(operation: dsa.Operation) -> None:
    golden = recorded_operations()
    seed = RECORDED_SEEDS[operation.__name__]
    images = torch.from_numpy(golden["input_seed7"])
    torch.manual_seed(seed)
    torch.randint(0, 1, (1,))  # the recording drew the operation from a list of one
    torch.testing.assert_close(
        operation(images), torch.from_numpy(golden[f"{operation.__name__}_seed{seed}"]), atol=1e-6, rtol=0
    )


def test_choice_of_operation_as_recorded() -> None:
    golden = recorded()["dsa_full_strategy_stats"]
    torch.manual_seed(7)
    images = torch.randn(16, 3, 32, 32)
    for seed, expected in golden.items():
        torch.manual_seed(int(seed))
        assert figures(dsa.augment(images)) == pytest.approx(expected, rel=1e-6, abs=1e-6), seed


@pytest.mark.parametrize("operation", dsa.OPERATIONS, ids=lambda operation: operation.__name__)
def test_argument_is_left_alone(operation: dsa.Operation) -> None:
    images = torch.randn(4, 3, 16, 16)
    before = images.clone()
    after = operation(images)
    assert torch.equal(images, before)
    assert after.shape == images.shape
    assert after.dtype == torch.float32


def test_every_operation_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Counter[int] = Counter()

    def recorder(place: int) -> dsa.Operation:
        def record(images: torch.Tensor) -> torch.Tensor:
            chosen[place] += 1
            return images

        return record

    monkeypatch.setattr(dsa, "OPERATIONS", tuple(recorder(place) for place in range(6)))
    torch.manual_seed(0)
    for _ in range(1200):
        dsa.augment(torch.zeros(1, 3, 8, 8))
    assert sum(chosen.values()) == 1200
    assert all(140 < chosen[place] < 260 for place in range(6)), chosen  # 200 each, standard deviation 13


def test_color_shifts_then_stretches() -> None:
    # Two levels of grey in the columns, and colour in the rows, so that each factor can be read off the result.
    grey = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 1, 8)
    tint = torch.tensor([0.5, -0.5]).repeat(4).view(1, 1, 8, 1) * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)
    torch.manual_seed(0)
    after = dsa.color((grey + tint).repeat(500, 1, 1, 1))
    lightness = after.mean(1)
    shift = lightness.mean((1, 2))
    contrast = (lightness[:, 0, 0] - lightness[:, 0, 1]) / 2
    saturation = (after[:, 0] - after[:, 2])[:, 0, 0] / contrast
    for values, low, high in ((shift, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        assert values.min() >= low - 1e-5
        assert values.max() <= high + 1e-5
        assert abs(values.mean() - (low + high) / 2) < 0.1
        assert values.max() - values.min() > 0.95 * (high - low)
    expected = shift.view(-1, 1, 1, 1) + contrast.view(-1, 1, 1, 1) * (grey + saturation.view(-1, 1, 1, 1) * tint)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


def test_crop_moves_by_at_most_an_eighth() -> None:
    images = torch.rand(300, 3, 16, 16) + 1
    torch.manual_seed(0)
    after = dsa.crop(images)
    seen = set()
    for image, moved in zip(images, after, strict=True):
        for down in range(-2, 3):
            for right in range(-2, 3):
                # What leaves on one side comes back on the other, so clear it there.
                expected = torch.roll(image, (down, right), (1, 2))
                expected[:, : max(down, 0)] = 0
                expected[:, 16 + min(down, 0) :] = 0
                expected[:, :, : max(right, 0)] = 0
                expected[:, :, 16 + min(right, 0) :] = 0
                if torch.equal(moved, expected):
                    seen.add((down, right))
                    break
            else:
                continue
            break
        else:
            pytest.fail("not a translation by whole pixels")
    assert len(seen) == 25


def test_cutout_clears_a_square_that_may_stick_out() -> None:
    images = torch.rand(300, 3, 16, 16) + 1
    torch.manual_seed(0)
    after = dsa.cutout(images)
    cleared = (after == 0).all(1)
    assert torch.equal(after, images * ~cleared.unsqueeze(1))
    heights, widths = cleared.any(2).sum(1), cleared.any(1).sum(1)
    assert torch.equal(cleared.sum((1, 2)), heights * widths), "not a rectangle"
    assert {int(h) for h in heights} == {int(w) for w in widths} == {4, 5, 6, 7, 8}


def test_flip_mirrors_half_of_the_images() -> None:
    images = torch.rand(400, 3, 8, 8)
    torch.manual_seed(0)
    after = dsa.flip(images)
    mirrored = (after == images.flip(3)).flatten(1).all(1)
    same = (after == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 160 < int(mirrored.sum()) < 240


def coordinates(count: int, size: int) -> torch.Tensor:
    """Images whose channels are x, y and one, x and y growing from -1 to 1 over the image."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack((x, y, torch.ones_like(x))).repeat(count, 1, 1, 1)


def test_scale_stretches_both_axes_on_their_own() -> None:
    images = coordinates(500, 32)
    torch.manual_seed(0)
    middle = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    before, after = images[middle], dsa.scale(images)[middle]
    factors = (after / before)[:, :2]
    by_axis = factors[:, :, 0, 0]
    torch.testing.assert_close(factors, by_axis[:, :, None, None].expand_as(factors), atol=1e-4, rtol=0)
    assert by_axis.min() >= 1 / 1.2 - 1e-4
    assert by_axis.max() <= 1.2 + 1e-4
    assert torch.corrcoef(by_axis.T)[0, 1].abs() < 0.2


def test_rotate_turns_by_at_most_fifteen_degrees() -> None:
    images = coordinates(500, 32)
    torch.manual_seed(0)
    after = dsa.rotate(images)
    # x' = x cos a - y sin a and y' = x sin a + y cos a, read at two pixels near the middle.
    x, y = images[0, 0, 16, 20], images[0, 1, 16, 20]
    turned_x, turned_y = after[:, 0, 16, 20], after[:, 1, 16, 20]
    torch.testing.assert_close(turned_x**2 + turned_y**2, (x**2 + y**2).expand(500), atol=1e-5, rtol=0)
    angle = torch.atan2(turned_y, turned_x) - torch.atan2(y, x)
    assert angle.abs().max() <= math.radians(15) + 1e-4
    assert angle.max() > math.radians(14)
    assert angle.min() < -math.radians(14)
    assert (after[:, 2, 0, 0] < 1).float().mean() > 0.9  # zeros come in at the corners
