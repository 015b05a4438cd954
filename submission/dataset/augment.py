"""Post data augmentation (PDA): further copies of generated images, made in batches.

`augment` makes one copy of each image it is given. What happens to an image is a function of (seed, class, round,
copy) alone; which other images share its batch changes nothing but the last bits of the arithmetic.

Both styles go through the same three steps, the order being that of the published PDA: colour (one linear map of
each pixel, then clipping), geometry (one bilinear resampling that holds flip, rotation, zoom and shift together),
gamma. Flips are part of the resampling because they commute with whatever acts on each pixel for itself.

Copies a second on AVX2 cores, 250 images a call (albumentations, one image after another: 1,800 at 32 px):

                  paper 32 px   natural 32 px   paper 64 px   natural 64 px
    one thread         36,000          47,000         9,700          11,700
    two threads        59,000          68,000        15,800          19,000

What makes it so, in microseconds an image, `paper`, 32 px, one thread:

    all of it, in groups of 64 images                    27   all 1,000 at a time                        37
    random numbers for all rows together                0.2   a SeedSequence a row                       18
    sampling grid as the sum of a row and a column      2.3   F.affine_grid                              12
    gamma as exp(gamma log x)                             8   pow                                        20
    gamma for the half that has one                     5.3   for all                                     8
    every image resampled                                11   only the rotated, the others flipped       12
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
PdaStyle = Literal["paper", "natural", "none"]

# `paper`: the augmentation published with the method (Su et al. 2024), which names these operations of the library
# albumentations. A fraction is how often an operation is applied, a limit the half-width of a uniform distribution.
PAPER_HFLIP = 0.8
PAPER_VFLIP = 0.8
PAPER_COLOUR = 0.5
PAPER_CONTRAST = 0.2  # factor 1 +- this, about black
PAPER_BRIGHTNESS = 0.2  # added, as a fraction of full scale
PAPER_ROTATE = 0.8
PAPER_ANGLE = 60.0  # degrees
PAPER_GAMMA = 0.5
PAPER_EXPONENT = 0.2  # exponent 1 +- this

# `natural`: what could have been another photograph of the same thing. Never upside down; the window keeps at least
# 85% of each side, so the object stays in view and a 32 px image is enlarged by less than 6 px; within 10 degrees the
# mirrored corners stay small. Colour varies as it does between two exposures of one scene.
NATURAL_HFLIP = 0.5
NATURAL_MIN_SIDE = 0.85
NATURAL_ANGLE = 10.0  # degrees
NATURAL_CONTRAST = 0.15  # factor 1 +- this, about mid-grey
NATURAL_BRIGHTNESS = 0.08
NATURAL_SATURATION = 0.25  # factor 1 +- this

# ITU-R BT.601 luma: the grey that a pixel keeps when its saturation is changed.
LUMA = (0.299, 0.587, 0.114)

# Keeps the draws made here apart from others made with the same seed.
PDA_DOMAIN = int.from_bytes(b"pda")

# Images are worked on in groups of about this many pixels. Their float planes (0.8 MB) then stay in a core's cache
# and in memory that the allocator reuses.
GROUP_PIXELS = 64 * 32 * 32


@dataclass(frozen=True)
class Parameters:
    """What is done to each of N images, in the order of the fields; float64 arrays of shape [N]."""

    gain: Floats  # a pixel is multiplied by this,
    saturation: Floats  # then its distance from its own grey by this,
    offset: Floats  # then this is added (1 is full scale) and the sum clipped to 0..1
    flip_x: Floats  # -1 exchanges left and right, 1 does not
    flip_y: Floats  # -1 exchanges top and bottom, 1 does not
    angle: Floats  # degrees, anticlockwise as seen, about the centre of the image
    side: Floats  # side of the square window that is enlarged to fill the image; 1 is all of it
    shift_x: Floats  # centre of that window, right of the centre of the image, in half widths
    shift_y: Floats  # and below it, in half heights
    gamma: Floats  # exponent on 0..1: above 1 darkens


def augment(images: Tensor, keys: NDArray[np.int64], seed: int, style: PdaStyle) -> Tensor:
    """One augmented copy of each image.

    images: uint8 [N, 3, H, W] with H, W >= 2. keys: int64 [N, 3], rows of (class, round, copy). seed: >= 0.
    Returns float32 [N, 3, H, W] in 0..1, on the device of `images`.

    Calls of a few hundred images are fastest, because the memory of the result is then reused.
    Raises ValueError where shapes or types are other than these.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise ValueError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
    if keys.shape != (len(images), 3):
        raise ValueError(f"keys must have shape [{len(images)}, 3], not {list(keys.shape)}")
    return apply(images, draw(keys, seed, style))


def random_words(keys: NDArray[np.int64], seed: int, domain: int, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit words for each row of `keys`, a function of (seed, domain, row) alone.

    keys: integers [N, K]. seed, domain: >= 0; domain separates uses of one seed. Returns uint64 [N, count]; a
    longer draw extends a shorter one.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a tree:
    numpy's SeedSequence turns (seed, domain) into the state at the root, and element number i of the stream that
    starts at a state is the state of its i-th child. An image's words are the first elements of the stream at the
    leaf its row leads to. A SeedSequence for each row would cost nearly as much as the copy itself.
    """
    state = np.random.SeedSequence((seed, domain)).generate_state(1, np.uint64).astype(np.uint64)
    for column in keys.T:
        state = _splitmix64(state, column.astype(np.uint64))
    return _splitmix64(state[:, None], np.arange(count, dtype=np.uint64))


def _splitmix64(state: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Element `index` (from 0) of the SplitMix64 stream that starts at `state`; the two broadcast."""
    word = state + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return mixed


def draw(keys: NDArray[np.int64], seed: int, style: PdaStyle) -> Parameters:
    """The random parameters of N copies. keys: int64 [N, 3], rows of (class, round, copy). seed: >= 0."""
    words = random_words(keys, seed, PDA_DOMAIN, 9)
    uniform = (words >> np.uint64(11)).astype(np.float64).T * 2.0**-53  # the upper 53 bits: every value is below 1
    match style:
        case "paper":
            return _draw_paper(uniform)
        case "natural":
            return _draw_natural(uniform)
        case "none":
            return unchanged(len(keys))


def unchanged(count: int) -> Parameters:
    """Parameters that leave `count` images as they are."""
    ones = dict.fromkeys(("gain", "saturation", "flip_x", "flip_y", "side", "gamma"), np.ones(count))
    zeros = dict.fromkeys(("offset", "angle", "shift_x", "shift_y"), np.zeros(count))
    return Parameters(**ones, **zeros)


def _draw_paper(uniform: Floats) -> Parameters:
    """`paper` parameters from numbers in 0..1, shape [9, N]."""
    hflip, vflip, colour, contrast, brightness, rotate, angle, gamma, exponent = uniform
    return replace(
        unchanged(uniform.shape[1]),
        gain=np.where(colour < PAPER_COLOUR, _around(1, PAPER_CONTRAST, contrast), 1.0),
        offset=np.where(colour < PAPER_COLOUR, _around(0, PAPER_BRIGHTNESS, brightness), 0.0),
        flip_x=np.where(hflip < PAPER_HFLIP, -1.0, 1.0),
        flip_y=np.where(vflip < PAPER_VFLIP, -1.0, 1.0),
        angle=np.where(rotate < PAPER_ROTATE, _around(0, PAPER_ANGLE, angle), 0.0),
        gamma=np.where(gamma < PAPER_GAMMA, _around(1, PAPER_EXPONENT, exponent), 1.0),
    )


def _draw_natural(uniform: Floats) -> Parameters:
    """`natural` parameters from numbers in 0..1, shape [9, N], of which the last row is not used."""
    hflip, zoom, shift_x, shift_y, angle, contrast, brightness, saturation, _ = uniform
    side = 1 - (1 - NATURAL_MIN_SIDE) * zoom
    gain = _around(1, NATURAL_CONTRAST, contrast)
    return replace(
        unchanged(uniform.shape[1]),
        gain=gain,
        saturation=_around(1, NATURAL_SATURATION, saturation),
        # The first term keeps mid-grey where it is, whatever the contrast.
        offset=0.5 * (1 - gain) + _around(0, NATURAL_BRIGHTNESS, brightness),
        flip_x=np.where(hflip < NATURAL_HFLIP, -1.0, 1.0),
        angle=_around(0, NATURAL_ANGLE, angle),
        side=side,
        # As far as keeps the window inside the image.
        shift_x=_around(0, 1 - side, shift_x),
        shift_y=_around(0, 1 - side, shift_y),
    )


def _around(middle: float, limit: Floats | float, uniform: Floats) -> Floats:
    """Uniform in middle - limit to middle + limit."""
    return middle + limit * (2 * uniform - 1)


def apply(images: Tensor, parameters: Parameters) -> Tensor:
    """Images changed as `parameters` say: uint8 [N, 3, H, W] to float32 [N, 3, H, W] in 0..1, same device.

    Nothing is rounded to 8 bits between the steps. The centre of an image lies at ((W - 1) / 2, (H - 1) / 2) in pixel
    indices, and beyond its border is its mirror image, the outermost pixels not repeated.
    """
    count, _, height, width = images.shape
    device = images.device
    gain = _planes(parameters.gain / 255, device)
    saturation = _planes(parameters.saturation, device)
    offset = _planes(parameters.offset, device)
    gamma = _planes(parameters.gamma, device)
    window = torch.from_numpy(_window(parameters, height, width)).to(device, torch.float32)
    luma = torch.tensor(LUMA, device=device).view(1, 3, 1, 1)
    across = torch.linspace(-1, 1, width, device=device)
    down = torch.linspace(-1, 1, height, device=device)
    result = torch.empty(images.shape, dtype=torch.float32, device=device)

    step = max(1, GROUP_PIXELS // (height * width))
    for start in range(0, count, step):
        group = slice(start, start + step)
        pixels = images[group].float().mul_(gain[group])
        if np.any(parameters.saturation[group] != 1):
            pixels = torch.lerp((pixels * luma).sum(1, keepdim=True), pixels, saturation[group])
        pixels.add_(offset[group]).clamp_(0, 1)

        # Each coordinate is a term of the column plus one of the row, which makes this cheaper than F.affine_grid.
        grid = torch.empty((len(pixels), height, width, 2), device=device)
        for axis in (0, 1):
            by_x, by_y, shift = window[group, axis, :, None].unbind(1)
            torch.add((by_x * across + shift)[:, None, :], (by_y * down)[:, :, None], out=grid[..., axis])
        pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        # Bilinear weights may add up to a little more than one.
        torch.clamp(pixels, 0, 1, out=result[group])

        # x ** gamma, without the images that have none. log(0) is -inf, and comes back as 0.
        changed = torch.from_numpy(np.flatnonzero(parameters.gamma[group] != 1)).to(device)
        if len(changed):
            powered = result[group].index_select(0, changed).log_().mul_(gamma[group][changed]).exp_()
            result[group].index_copy_(0, changed, powered)
    return result


def _planes(values: Floats, device: torch.device) -> Tensor:
    """One number per image as float32 [N, 1, 1, 1]."""
    return torch.from_numpy(values).to(device, torch.float32).view(-1, 1, 1, 1)


def _window(parameters: Parameters, height: int, width: int) -> Floats:
    """Where each pixel of the result comes from: float64 [N, 2, 3], mapping (x, y, 1) there to (x, y) in the image.

    Coordinates run from -1 to 1 between the centres of the first and last pixels. An axis is scaled to the unit of the
    other before it is mixed into it, so that a rotation stays one in images that are not square.
    """
    angle = np.deg2rad(parameters.angle)
    cosine, sine = np.cos(angle) * parameters.side, np.sin(angle) * parameters.side
    aspect = (width - 1) / (height - 1)
    flip_x, flip_y = parameters.flip_x, parameters.flip_y
    to_x = [flip_x * cosine, -flip_x * sine / aspect, parameters.shift_x]
    to_y = [flip_y * sine * aspect, flip_y * cosine, parameters.shift_y]
    return np.stack([np.stack(to_x, 1), np.stack(to_y, 1)], 1)
