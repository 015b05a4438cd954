"""The last stage: samples are bent towards what tells the classes apart.

The training set that the samples are is judged as one is used: by how well the real images' classes follow from it. A
network in the first steps of learning sees both; kernel ridge regression on what it sees, from the samples, stands for
the rest of the learning (Zhou et al. 2022, FRePo) and is differentiable.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tools import dsa
from tools.embedded.critic import Critic, normalised
from tools.embedded.gaussians import ClassGaussians, sample_class_gaussians
from tools.embedded.images import RealImages
from tools.embedded.layout import Networks
from tools.embedded.one_step import Prompts, draw_batch, errors, make, optimisers_of
from tools.embedded.progress import Progress, record, steps, update
from tools.embedded.vae import decode_latents

CLASSES_IN_BATCH, IMAGES_OF_CLASS = 40, 16  # a batch: classes, images of each; as many real ones
RATE = 7e-4
RIDGE = 1.0  # times the mean of the kernel's diagonal; a tenth of it, and the predictions are worse than none
# Of the squared error to the Gaussians. Without it, samples became the few pictures of a class that are easy to learn.
ANCHOR = 0.3


def train_sharpen(
    networks: Networks,
    progress: Progress,
    prompts: Prompts,
    gaussians: ClassGaussians,
    critics: Sequence[Critic],
    images: RealImages,
    total: int,
    on_save: Callable[[], None],
) -> None:
    """Train UNet and text encoders on, for `total` steps, each judged by one of the critics."""
    parameters, optimisers = optimisers_of(networks, RATE)
    for _ in steps(progress, optimisers, total, on_save):
        batch = draw_batch(prompts, CLASSES_IN_BATCH, IMAGES_OF_CLASS, progress.generator)
        latents = make(networks, batch)
        regression, of_mean = errors(latents, sample_class_gaussians(gaussians, batch.classes, batch.noise))
        real = images.draw(batch.classes, IMAGES_OF_CLASS, progress.generator)
        critic = critics[int(torch.randint(len(critics), (), generator=progress.generator))]
        pictures = torch.cat([normalised(decode_latents(networks.vae, latents.flatten(0, 1))), normalised(real)])
        of_made, of_real = critic(augmented(pictures, progress.generator))[-1].flatten(1).chunk(2)
        labels = torch.arange(len(batch.classes)).repeat_interleave(IMAGES_OF_CLASS)
        missed = disagreement(of_made, of_real, labels)
        update(optimisers, parameters, missed + ANCHOR * (regression + of_mean))
        record(progress, missed=missed.item(), regression=regression.item())


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """As the evaluator augments a batch, drawn from `generator`; torch's global generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return dsa.augment(pictures)


def disagreement(of_made: Tensor, of_real: Tensor, labels: Tensor) -> Tensor:
    """How far the real images' classes are from those that a ridge regression on the made ones predicts, 0 to 2: one
    less the cosine of prediction and truth. A scalar with the gradient to `of_made`.

    Args:
        of_made: features, float32 [N, F].
        of_real: the same of real images of the same classes.
        labels: int64 [N], the classes of both, numbered from 0.
    """
    truth = F.one_hot(labels).float()
    truth = truth - truth.mean(dim=1, keepdim=True)
    kernel = of_made @ of_made.T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel))
    predicted = of_real.detach() @ of_made.T @ torch.linalg.solve(kernel + ridge, truth)
    return 1 - F.cosine_similarity(predicted, truth).mean()
