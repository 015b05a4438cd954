"""ConvNetD3-W128, the small network that the organisers of the challenge train to score a data set."""

import torch
from torch import nn

WIDTH = 128  # channels of every hidden layer
DEPTH = 3  # blocks of convolution, norm, ReLU and pooling; each halves the height and the width


class ConvNet(nn.Module):
    """Three blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, and one linear layer.

    It is the ConvNet of Gidaris and Komodakis (2018) as the data set condensation papers use it (Zhao et al., 2021).
    Modules are made in the reference's order and initialised by torch's defaults, so that one seed of torch gives the
    reference's weights; `state_dict` has its names as well.
    """

    def __init__(self, classes: int, size: int) -> None:
        """Args: classes, the number of logits; size, height and width of the images in pixels, at least 8."""
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        channels = 3
        for _ in range(DEPTH):
            layers += [
                nn.Conv2d(channels, WIDTH, kernel_size=3, padding=1),
                # A group per channel is instance norm with the affine parameters that nn.InstanceNorm2d leaves out.
                nn.GroupNorm(WIDTH, WIDTH, affine=True),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(kernel_size=2, stride=2),
            ]
            channels = WIDTH
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(WIDTH * (size // 2**DEPTH) ** 2, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [N, classes], of normalised images, float32 [N, 3, size, size]."""
        logits: torch.Tensor = self.classifier(self.features(images).flatten(1))
        return logits
