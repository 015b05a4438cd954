"""PDA against albumentations and scipy, its distributions, and that a copy depends on its identity alone."""

import os
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.ndimage import map_coordinates
from scipy.stats import ks_2samp, kstest
from torch import Tensor

from submission.dataset.augment import GROUP_PIXELS, Parameters, PdaStyle, apply, augment, draw, random_words, unchanged

STYLES: tuple[PdaStyle, ...] = ("paper", "natural")
Array = NDArray[Any]

# How far float arithmetic alone may set two results apart, in 8-bit levels.
LEVELS = 0.01


@pytest.fixture(scope="module")
def albumentations() -> ModuleType:
    """The library whose operations the published PDA names."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for its newest version when imported
    module: ModuleType = pytest.importorskip("albumentations", reason="albumentations is the reference for these tests")
    return module


def noisy(height: int, width: int) -> Array:
    """uint8 [H, W, 3], every pixel for itself: the hardest case for a resampling."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Array:
    """uint8 [H, W, 3], waves that touch both ends of the scale."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 5 + y / 9), np.cos(y / 6), np.sin((x + y) / 11)], -1)
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)


PICTURES = [
    pytest.param(noisy(32, 32), id="noisy"),
    pytest.param(smooth(64, 64), id="smooth"),
    pytest.param(noisy(20, 33), id="wide"),
]


def batch(picture: Array, count: int = 1) -> Tensor:
    """uint8 [count, 3, H, W], the picture repeated."""
    return torch.from_numpy(np.repeat(picture.transpose(2, 0, 1)[None], count, 0))


def levels(images: Tensor) -> Array:
    """float64 [N, H, W, 3] on the 8-bit scale."""
    return images.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255


def fixed(**values: float) -> Parameters:
    """Parameters for one image, unchanged but for these."""
    return replace(unchanged(1), **{name: np.array([value]) for name, value in values.items()})


def keys(count: int) -> NDArray[np.int64]:
    """`count` different rows (class, round, copy), of ten classes."""
    index = np.arange(count)
    return np.stack([index % 10, index // 40, index // 10 % 4], 1)


# --- against albumentations: what an operation does


def same_as(
    albumentations: ModuleType, picture: Array, operation: str, options: dict[str, Any], parameters: Parameters
) -> None:
    """Float images must come out the same; uint8 images within the level that albumentations rounds off."""
    reference = getattr(albumentations, operation)(p=1, **options)
    ours = levels(apply(batch(picture), parameters))[0]
    exact = reference(image=picture.astype(np.float32) / 255)["image"] * 255.0
    np.testing.assert_allclose(ours, exact, rtol=0, atol=LEVELS)
    np.testing.assert_allclose(ours, reference(image=picture)["image"], rtol=0, atol=1 + LEVELS)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("operation", "axis"), [("HorizontalFlip", "flip_x"), ("VerticalFlip", "flip_y")])
def test_flips_are_albumentations(albumentations: ModuleType, picture: Array, operation: str, axis: str) -> None:
    same_as(albumentations, picture, operation, {}, fixed(**{axis: -1}))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("contrast", "brightness"), [(0.2, 0.2), (-0.2, -0.2), (0.17, -0.11), (-0.06, 0.2)])
def test_brightness_and_contrast_are_albumentations(
    albumentations: ModuleType, picture: Array, contrast: float, brightness: float
) -> None:
    options = {"contrast_limit": (contrast, contrast), "brightness_limit": (brightness, brightness)}
    parameters = fixed(gain=1 + contrast, offset=brightness)
    same_as(albumentations, picture, "RandomBrightnessContrast", options, parameters)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("angle", [-60, -33.3, 7, 45, 60])
def test_rotation_is_albumentations(albumentations: ModuleType, picture: Array, angle: float) -> None:
    same_as(albumentations, picture, "Rotate", {"limit": (angle, angle)}, fixed(angle=angle))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("gamma", [0.8, 0.93, 1.2])
def test_gamma_is_albumentations(albumentations: ModuleType, picture: Array, gamma: float) -> None:
    same_as(albumentations, picture, "RandomGamma", {"gamma_limit": (gamma * 100, gamma * 100)}, fixed(gamma=gamma))


@pytest.mark.parametrize("picture", PICTURES)
def test_operations_follow_each_other_as_published(albumentations: ModuleType, picture: Array) -> None:
    """On float images, so that what differs can only be the order; these values clip, so the order shows."""
    height, width, _ = picture.shape
    reference = albumentations.Compose(
        [
            albumentations.RandomCrop(height, width),
            albumentations.HorizontalFlip(p=1),
            albumentations.VerticalFlip(p=1),
            albumentations.RandomBrightnessContrast((0.15, 0.15), (0.2, 0.2), p=1),
            albumentations.Rotate((25, 25), p=1),
            albumentations.RandomGamma((115, 115), p=1),
        ]
    )(image=picture.astype(np.float32) / 255)["image"]
    parameters = fixed(flip_x=-1, flip_y=-1, gain=1.2, offset=0.15, angle=25, gamma=1.15)
    np.testing.assert_allclose(levels(apply(batch(picture), parameters))[0], reference * 255.0, rtol=0, atol=LEVELS)


# --- against albumentations: how often, and how much

DRAWS = 3000
# The two-sample Kolmogorov-Smirnov distance that 3000 draws of one distribution exceed once in 10,000 times.
DISTANCE = 2.23 * np.sqrt(2 / DRAWS)


def ramps() -> Array:
    """uint8 [21, 21, 3]: red grows to the right, green downwards (4 levels a pixel), blue is 60 left and 180 right."""
    y, x = np.mgrid[-10:11, -10:11]
    return np.stack([128 + 4 * x, 128 + 4 * y, np.where(x < 0, 60, 180)], -1).astype(np.uint8)


def outcomes(images: Array) -> dict[str, Array]:
    """What can be seen of each operation in pictures made of `ramps`, levels [N, 21, 21, 3]."""
    right = images[:, 10, 13, :2] - images[:, 10, 7, :2]  # how much redder and greener it gets to the right
    return {
        "middle": images[:, 10, 10, 0],
        "steepness": np.hypot(*right.T),
        "direction": np.degrees(np.arctan2(*right.T)),
        "corner": images[:, 0, 0, 0],
        "blue": images[:, 3, 17, 2],
        "mean": images.mean((1, 2, 3)),
    }


@pytest.mark.parametrize(
    ("operation", "options", "names"),
    [
        ("HorizontalFlip", {"p": 0.8}, ["flip_x"]),
        ("VerticalFlip", {"p": 0.8}, ["flip_y"]),
        ("RandomBrightnessContrast", {"p": 0.5}, ["gain", "offset"]),
        ("Rotate", {"p": 0.8, "limit": 60}, ["angle"]),
        ("RandomGamma", {"p": 0.5}, ["gamma"]),
        ("all", {}, [field.name for field in fields(Parameters)]),
    ],
)
def test_outcomes_are_distributed_as_albumentations(
    albumentations: ModuleType, operation: str, options: dict[str, Any], names: list[str]
) -> None:
    if operation == "all":
        reference = albumentations.Compose(
            [
                albumentations.RandomCrop(21, 21),
                albumentations.HorizontalFlip(p=0.8),
                albumentations.VerticalFlip(p=0.8),
                albumentations.RandomBrightnessContrast(p=0.5),
                albumentations.Rotate(limit=60, p=0.8),
                albumentations.RandomGamma(p=0.5),
            ],
            seed=1,
        )
    else:
        reference = albumentations.Compose([getattr(albumentations, operation)(**options)], seed=1)
    # Float images: the gaps that 8-bit rounding leaves between values are not what is compared.
    picture = ramps()
    theirs = np.stack([reference(image=picture.astype(np.float32) / 255)["image"] for _ in range(DRAWS)]) * 255.0

    drawn = draw(keys(DRAWS), 1, "paper")
    parameters = replace(unchanged(DRAWS), **{name: getattr(drawn, name) for name in names})
    ours = levels(apply(batch(picture, DRAWS), parameters))

    still = [(np.abs(images - picture).max((1, 2, 3)) < 0.1).mean() for images in (theirs, ours)]
    assert still[0] == pytest.approx(still[1], abs=0.04)  # 3.1 standard deviations of the difference of two halves
    expected = outcomes(theirs)
    for name, values in outcomes(ours).items():
        # Rounded to what float noise cannot touch, or ties such as "not flipped at all" would count as differences.
        assert ks_2samp(np.rint(values * 10), np.rint(expected[name] * 10)).statistic < DISTANCE, name


# --- the distributions themselves

MANY = 20_000


@pytest.mark.parametrize(
    ("style", "name", "neutral", "applied", "low", "high"),
    [
        ("paper", "flip_x", 1, 0.8, -1, -1),
        ("paper", "flip_y", 1, 0.8, -1, -1),
        ("paper", "gain", 1, 0.5, 0.8, 1.2),
        ("paper", "offset", 0, 0.5, -0.2, 0.2),
        ("paper", "angle", 0, 0.8, -60, 60),
        ("paper", "gamma", 1, 0.5, 0.8, 1.2),
        ("natural", "flip_x", 1, 0.5, -1, -1),
        ("natural", "gain", 1, 1, 0.85, 1.15),
        ("natural", "saturation", 1, 1, 0.75, 1.25),
        ("natural", "angle", 0, 1, -10, 10),
        ("natural", "side", 1, 1, 0.85, 1),
    ],
)
def test_parameters_are_uniform_where_applied(
    style: PdaStyle, name: str, neutral: float, applied: float, low: float, high: float
) -> None:
    values = getattr(draw(keys(MANY), 2, style), name)
    changed = values[values != neutral]
    assert len(changed) / MANY == pytest.approx(applied, abs=0.014)  # 4 standard deviations at a half
    if low == high:
        assert set(changed) == {low}
    else:
        # Exceeded once in 10,000 times.
        assert kstest(changed, "uniform", (low, high - low)).statistic < 2.23 / np.sqrt(len(changed))


@pytest.mark.parametrize("style", STYLES)
def test_parameters_are_independent_of_each_other(style: PdaStyle) -> None:
    drawn = draw(keys(MANY), 3, style)
    columns = np.array([getattr(drawn, field.name) for field in fields(Parameters)])
    columns = columns[columns.std(1) > 0]
    if style == "natural":
        offset = [field.name for field in fields(Parameters)].index("offset")
        assert np.corrcoef(drawn.gain, drawn.offset)[0, 1] < -0.5  # mid-grey stays where it is: on purpose
        columns = np.delete(columns, offset, 0)
    else:
        # One operation changes both or neither, each by its own amount.
        assert ((drawn.gain != 1) == (drawn.offset != 0)).all()
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(MANY)


# --- natural


def test_natural_stays_upright_and_inside_the_image() -> None:
    drawn = draw(keys(MANY), 4, "natural")
    assert (drawn.flip_y == 1).all()
    assert (drawn.gamma == 1).all()
    for shift in (drawn.shift_x, drawn.shift_y):
        assert (np.abs(shift) + drawn.side <= 1 + 1e-12).all()
        assert kstest(shift / (1 - drawn.side), "uniform", (-1, 2)).statistic < 2.23 / np.sqrt(MANY)


def test_natural_colour_keeps_grey_grey_and_centred() -> None:
    grey = np.full((8, 8, 3), 127, np.uint8)
    drawn = replace(draw(keys(400), 5, "natural"), angle=np.zeros(400))
    made = levels(apply(batch(grey, 400), drawn))
    assert np.ptp(made, axis=(1, 2, 3)).max() < LEVELS
    assert np.abs(made.mean((1, 2, 3)) - 127.5).max() < 255 * 0.08 + 1
    assert np.abs(made.mean((1, 2, 3)) - 127.5).max() > 255 * 0.07


@pytest.mark.parametrize("saturation", [0.75, 1.25])
def test_saturation_is_that_of_pillow(saturation: float) -> None:
    picture = smooth(32, 32)
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(picture)).enhance(saturation), dtype=np.float64)
    # Pillow rounds the grey and then the result.
    np.testing.assert_allclose(
        levels(apply(batch(picture), fixed(saturation=saturation)))[0], expected, rtol=0, atol=1.5
    )


# --- both


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("picture", PICTURES)
def test_geometry_is_that_of_scipy(style: PdaStyle, picture: Array) -> None:
    """Flip, rotation, zoom and shift together, each output pixel's place in the input worked out from the words."""
    count = 12
    drawn = draw(keys(count), 6, style)
    plain = unchanged(count)
    shape_only = replace(drawn, gain=plain.gain, saturation=plain.saturation, offset=plain.offset, gamma=plain.gamma)
    made = levels(apply(batch(picture, count), shape_only))
    height, width, _ = picture.shape
    y, x = np.mgrid[0:height, 0:width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    for i in range(count):
        turned = (x + 1j * y) * np.exp(1j * np.deg2rad(drawn.angle[i])) * drawn.side[i]
        from_x = (1 + drawn.flip_x[i] * turned.real / ((width - 1) / 2) + drawn.shift_x[i]) * (width - 1) / 2
        from_y = (1 + drawn.flip_y[i] * turned.imag / ((height - 1) / 2) + drawn.shift_y[i]) * (height - 1) / 2
        for channel in range(3):
            source = picture[..., channel].astype(np.float64)
            expected = map_coordinates(source, [from_y, from_x], order=1, mode="mirror")
            np.testing.assert_allclose(made[i, ..., channel], expected, rtol=0, atol=LEVELS)


@pytest.mark.parametrize("picture", PICTURES)
def test_neutral_parameters_and_style_none_change_nothing(picture: Array) -> None:
    images = batch(picture, 3)
    np.testing.assert_allclose(levels(apply(images, unchanged(3))), levels(images / 255), rtol=0, atol=LEVELS)
    np.testing.assert_allclose(levels(augment(images, keys(3), 0, "none")), levels(images / 255), rtol=0, atol=LEVELS)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("value", [None, 0, 255])
def test_result_is_float32_in_0_to_1_and_the_input_untouched(style: PdaStyle, value: int | None) -> None:
    images = batch(noisy(16, 16) if value is None else np.full((16, 16, 3), value, np.uint8), 300)
    before = images.clone()
    made = augment(images, keys(300), 7, style)
    assert made.dtype == torch.float32
    assert made.shape == images.shape
    assert made.min() >= 0  # NaN fails here too
    assert made.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("style", STYLES)
def test_same_request_same_copies_and_every_part_of_it_matters(style: PdaStyle) -> None:
    images = batch(smooth(16, 16))
    rows = [(3, 2, 1), (4, 2, 1), (3, 4, 1), (3, 2, 4), (2, 3, 1), (1, 2, 3)]
    made = [augment(images, np.array([row]), seed, style) for row in rows for seed in (0, 1)]
    assert torch.equal(made[0], augment(images, np.array([(3, 2, 1)]), 0, style))
    for i, one in enumerate(made):
        for other in made[:i]:
            assert (one - other).abs().max() > 0.01


row = st.tuples(st.integers(0, 199), st.integers(0, 499), st.integers(1, 10))


@settings(max_examples=40)
@given(rows=st.lists(row, min_size=1, max_size=9), seed=st.integers(0, 2**64), style=st.sampled_from(STYLES))
def test_a_copy_does_not_depend_on_its_batch(rows: list[tuple[int, int, int]], seed: int, style: PdaStyle) -> None:
    images = torch.randint(
        0, 256, (len(rows), 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    together = augment(images, np.array(rows), seed, style)
    alone = [augment(images[i : i + 1], np.array(rows[i : i + 1]), seed, style) for i in range(len(rows))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    backwards = augment(images.flip(0), np.array(rows[::-1]), seed, style)
    torch.testing.assert_close(together, backwards.flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_groups_join_up(style: PdaStyle) -> None:
    """More images than are worked on at a time, and not a multiple of it."""
    size = 64
    count = 2 * GROUP_PIXELS // size**2 + 3
    images = batch(noisy(size, size), count)
    whole = augment(images, keys(count), 8, style)
    parts = [augment(images[i::7], keys(count)[i::7], 8, style) for i in range(7)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(whole[i::7], part, rtol=0, atol=1e-5)


def test_no_images_make_no_copies() -> None:
    assert augment(torch.empty(0, 3, 8, 8, dtype=torch.uint8), keys(0), 0, "paper").shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "rows"),
    [
        (torch.zeros(2, 3, 8, 8), keys(2)),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), keys(2)),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), keys(3)),
        (torch.zeros(2, 3, 8, 1, dtype=torch.uint8), keys(2)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), keys(3)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), keys(2)[:, :2]),
    ],
)
def test_wrong_shapes_and_types_are_refused(images: Tensor, rows: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="must"):
        augment(images, rows, 0, "paper")


# --- random words


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 in whole numbers, as its authors define it."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append(word ^ word >> 31)
    return words


def test_words_are_splitmix64_down_a_tree() -> None:
    # The stream of state 1234567 as published implementations list it.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    state = int(np.random.SeedSequence((9, 5)).generate_state(1, np.uint64)[0])
    for branch in (2, 0, 3):
        state = splitmix64(state, branch + 1)[branch]
    rows = np.array([(7, 7, 7), (2, 0, 3)])
    assert random_words(rows, seed=9, domain=5, count=4)[1].tolist() == splitmix64(state, 4)


def test_words_differ_with_every_part_and_a_longer_draw_extends_a_shorter() -> None:
    rows = np.stack(np.meshgrid(np.arange(20), np.arange(20), np.arange(5), indexing="ij"), -1).reshape(-1, 3)
    drawn = [random_words(rows, seed, domain, 6) for seed in (0, 1) for domain in (0, 1)]
    assert len(np.unique(np.stack(drawn))) == 4 * len(rows) * 6
    assert (random_words(rows, 0, 0, 2) == drawn[0][:, :2]).all()
    with pytest.raises(ValueError, match="non-negative"):
        random_words(rows, -1, 0, 1)
