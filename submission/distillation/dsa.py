"""Differentiable Siamese augmentation (Zhao and Bilen, 2021) as the organisers' evaluator draws and computes it.

A batch goes through one operation, drawn from six; inside it every image has its own random parameters. All functions
take and return normalised images, float32 [N, 3, H, W], and leave their argument as it was. Random numbers come from
torch's global generators in the reference's order, so that a seeded run agrees with a seeded run of the reference:
the choice of the operation, and the parameters of `scale` and `rotate`, from the CPU's, all else from that of the
images' device.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

# The reference's ParamDiffAug.
BRIGHTNESS = 1.0  # width of the interval of the shift, centred on 0
SATURATION = 2.0  # largest factor on the distance from the pixel's grey
CONTRAST = 0.5  # smallest factor on the distance from the image's mean; the largest is 1 more
CROP_PAD = 0.125  # largest translation, in heights and widths
CUTOUT = 0.5  # side of the square cut out, in heights and widths
FLIP_PROBABILITY = 0.5
SCALE = 1.2  # largest factor on the sampling grid in either direction; the smallest is its inverse
ROTATE_DEGREES = 15.0  # largest angle in either direction


def color(images: torch.Tensor) -> torch.Tensor:
    """Brightness, then saturation, then contrast."""
    images = images + (_uniform(images) - 0.5) * BRIGHTNESS
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (_uniform(images) * SATURATION) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_uniform(images) + CONTRAST) + mean


def crop(images: torch.Tensor) -> torch.Tensor:
    """A translation by whole pixels in both directions; zeros come in at the border."""
    height, width = images.shape[2:]
    most_y, most_x = _pixels(height, CROP_PAD), _pixels(width, CROP_PAD)
    # Offsets into the padded image, so 0 is the furthest translation one way; the reference draws them from -most on.
    first_row = _integers(images, -most_y, most_y) + most_y
    first_column = _integers(images, -most_x, most_x) + most_x
    padded = F.pad(images, (most_x, most_x, most_y, most_y))
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    rows = first_row + torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = first_column + torch.arange(width, device=images.device)
    return padded[image, channel, rows, columns]


def cutout(images: torch.Tensor) -> torch.Tensor:
    """Zeros in a square whose centre lies anywhere in the image, so that part of the square may lie outside."""
    height, width = images.shape[2:]
    side_y, side_x = _pixels(height, CUTOUT), _pixels(width, CUTOUT)
    # An even side has no middle pixel: its centre is a corner between pixels, of which there is one more.
    top = _integers(images, 0, height - side_y % 2) - side_y // 2
    left = _integers(images, 0, width - side_x % 2) - side_x // 2
    row = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    column = torch.arange(width, device=images.device)
    inside = (row >= top) & (row < top + side_y) & (column >= left) & (column < left + side_x)
    return images.masked_fill(inside, 0.0)


def flip(images: torch.Tensor) -> torch.Tensor:
    """A mirror image, left for right, of about half of the images."""
    return torch.where(_uniform(images) < FLIP_PROBABILITY, images.flip(3), images)


def scale(images: torch.Tensor) -> torch.Tensor:
    """A stretch about the centre by its own factor along either axis, bilinear, zeros outside."""
    return resample(images, _stretches(len(images)))


def rotate(images: torch.Tensor) -> torch.Tensor:
    """A rotation about the centre, bilinear, zeros outside."""
    return resample(images, _turns(len(images)))


Operation = Callable[..., torch.Tensor]
# The order is part of the protocol: the operation is drawn by its place, as in "color_crop_cutout_flip_scale_rotate".
OPERATIONS: tuple[Operation, ...] = (color, crop, cutout, flip, scale, rotate)


def draw(count: int) -> tuple[Operation, tuple[torch.Tensor, ...]]:
    """An operation, drawn with equal odds for a whole batch of `count` images, and what it takes beside them.

    All that comes from the CPU's generator is drawn here, so that the rest can be recorded on a GPU.
    """
    operation = OPERATIONS[int(torch.randint(0, len(OPERATIONS), size=(1,)).item())]
    if operation is scale:
        return resample, (_stretches(count),)
    if operation is rotate:
        return resample, (_turns(count),)
    return operation, ()


def augment(images: torch.Tensor) -> torch.Tensor:
    """The images after one operation, drawn with equal odds for the whole batch."""
    operation, others = draw(len(images))
    return operation(images, *others)


def _stretches(count: int) -> torch.Tensor:
    """Maps of `scale`, [4, count]."""
    smallest = 1.0 / SCALE
    factor_x = torch.rand(count) * (SCALE - smallest) + smallest
    factor_y = torch.rand(count) * (SCALE - smallest) + smallest
    zero = torch.zeros_like(factor_x)
    return torch.stack((factor_x, zero, zero, factor_y))


def _turns(count: int) -> torch.Tensor:
    """Maps of `rotate`, [4, count]."""
    angle = (torch.rand(count) - 0.5) * 2 * ROTATE_DEGREES / 180 * math.pi
    return torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()))


def _pixels(length: int, ratio: float) -> int:
    """The part `ratio` of a length, to the nearest pixel."""
    return int(length * ratio + 0.5)


def _uniform(images: torch.Tensor) -> torch.Tensor:
    """Random numbers in [0, 1), one per image, [N, 1, 1, 1]."""
    return torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)


def _integers(images: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Random integers, both ends included, one per image, [N, 1, 1, 1]."""
    return torch.randint(lowest, highest + 1, size=(len(images), 1, 1, 1), device=images.device)


def resample(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Images sampled on linear maps of their pixel grid, from output to input; maps is [4, N], an image's 2 x 2 matrix
    row by row.

    The grid is that of `affine_grid`, which the reference calls, but without a matrix product, which CPUs round
    differently: values of pixels differed by 1e-5.
    """
    x, y = (_centres(images, length) for length in (images.shape[3], images.shape[2]))
    xx, xy, yx, yy = maps.to(images)[..., None, None]
    grid = torch.stack((xx * x + xy * y[:, None], yx * x + yy * y[:, None]), dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _centres(images: torch.Tensor, length: int) -> torch.Tensor:
    """Where the pixels of a row have their middles when its ends are at -1 and 1, float32 [length]."""
    return torch.linspace(-1, 1, length, device=images.device) * (length - 1) / length
