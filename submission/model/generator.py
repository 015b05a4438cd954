"""Image numbers to pixels: an image spec, a checkpoint's networks and a decoder put together."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from submission.errors import CheckpointError, importing
from submission.log import Log
from submission.machine.device import wake
from submission.machine.memory import return_freed
from submission.model import pipeline
from submission.model.checkpoint import Checkpoint, read_ahead
from submission.model.decoder import Decoder, choose_vae_dtype, decode, full_decoder
from submission.model.image_spec import ImageSpec
from submission.model.sampler import Sampler, draw, in_float32, load_sampler, sample
from submission.tasks import Task


@dataclass
class Generator:
    """Makes image i, of class `i % classes` in round `i // classes`, whatever batch it is asked for in.

    `prompt_of` [phrasings, classes] indexes `conditioning`; round r takes phrasing `r % phrasings`. Where there are
    prompts `waiting`, they are encoded when an image needs them. Images that came out broken and were made again in
    higher precision are counted in `regenerated`.
    """

    image: ImageSpec
    sampler: Sampler
    conditioning: pipeline.Conditioning
    prompt_of: Tensor
    vae: Any
    decoder: Decoder
    waiting: pipeline.WaitingPrompts | None = None
    regenerated: int = 0

    @property
    def task(self) -> Task:
        return self.image.task

    @property
    def resolution(self) -> int:
        """The side of the canvas, pixels."""
        return self.sampler.resolution

    def images(self, numbers: NDArray[np.int64], log: Log) -> Tensor:
        """The images of those numbers [n] as uint8 [n, 3, size, size] on the CPU. Raises CheckpointError."""
        latents = self.latents(numbers, log)
        pixels, sound = decode(self.decoder, latents)
        if not sound.all() and self.decoder.rung != "vae":
            self._count(sound, f"the decoder {self.decoder.rung}: the VAE decodes from now on", log)
            self.decoder = full_decoder(self.vae, self.task.size)
            pixels, sound = decode(self.decoder, latents)
        if not sound.all() and self.vae.dtype != torch.float32:
            self._count(sound, f"the VAE in {_name(self.vae.dtype)}: decoding in float32 from now on", log)
            self.vae.float()
            pixels, sound = decode(self.decoder, latents)
        if not sound.all():
            broken = int(numbers[(~sound).cpu().numpy()][0]) % len(self.task.classes)
            raise CheckpointError(
                f"this checkpoint makes broken images at {self.resolution} px (not finite or of one colour), the first "
                f"of class {self.task.classes[broken].name}: is it a one-step model, and is the resolution one it was "
                "trained for?"
            )
        return pixels.cpu()

    def latents(self, numbers: NDArray[np.int64], log: Log) -> Tensor:
        """Clean latents, float32 [n, 4, side, side], of the images of those numbers."""
        rounds, labels = np.divmod(numbers, len(self.task.classes))
        prompts = self.prompt_of[torch.from_numpy(rounds) % len(self.prompt_of), torch.from_numpy(labels)]
        if self.waiting:
            self.waiting.fill(self.conditioning, prompts.tolist())
            self.waiting = self.waiting or None  # with the last one, the encoders are let go
        latents = self._sample(labels, rounds, prompts)
        finite = latents.flatten(1).isfinite().all(1)
        if not finite.all() and self.sampler.dtype != torch.float32:
            self._count(finite, f"the UNet in {_name(self.sampler.dtype)}: generating in float32 from now on", log)
            self.sampler, self.conditioning = in_float32(self.sampler, self.conditioning)
            latents = self._sample(labels, rounds, prompts)
        return latents

    def _sample(self, labels: NDArray[np.int64], rounds: NDArray[np.int64], prompts: Tensor) -> Tensor:
        draws = draw(self.sampler, self.image.seed, labels.tolist(), rounds.tolist())
        return sample(self.sampler, self.conditioning, prompts, draws)

    def _count(self, sound: Tensor, remedy: str, log: Log) -> None:
        broken = int((~sound).sum())
        self.regenerated += broken
        log.warn(f"{broken} broken images from {remedy}")


def load_generator(
    image: ImageSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    log: Log,
    *,
    dtype: torch.dtype | None = None,
    project_prompts: bool = True,
) -> Generator:
    """Encodes all prompts, lets the text encoders go, and loads UNet and VAE, which decodes until a rung is chosen.

    `dtype` is the networks'; None takes what is fastest here. `project_prompts` takes memory for speed
    (`pipeline.project_prompts`). Without it, prompts in several phrasings wait until images need them, and so do the
    encoders. Raises UsageError or CheckpointError.
    """
    resolution, size = image.canvas(checkpoint), image.task.size
    if resolution < size:
        log.warn(f"images are generated at {resolution} px and enlarged to {size} px")
    dtype = dtype or pipeline.choose_dtype(device)
    phrasings = image.prompt_rows(checkpoint)
    prompts = list(dict.fromkeys(chain.from_iterable(phrasings)))
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    read_ahead(checkpoint)
    wake(device, dtype)
    with log.phase("import libraries"), importing():
        import diffusers  # noqa: PLC0415  # slow to import
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: PLC0415, F401
        from transformers import CLIPTextModel  # noqa: PLC0415, F401

        diffusers.utils.logging.disable_progress_bar()  # of shards
    with log.phase("encode prompts"):
        if cut := pipeline.too_long(checkpoint, prompts):
            log.warn(f"{len(cut)} of {len(prompts)} prompts are longer than the model reads and are cut: {cut[0]!r}")
        waiting = None
        if project_prompts or len(phrasings) == 1:
            conditioning = pipeline.encode_prompts(checkpoint, prompts, device, dtype)
        else:
            conditioning, waiting = pipeline.encode_later(checkpoint, prompts, device, dtype)
        return_freed()
    with log.phase("load UNet and VAE"):
        sampler = load_sampler(checkpoint, resolution, device, dtype)
        vae = pipeline.load_vae(checkpoint, device, choose_vae_dtype(device, dtype))
    if project_prompts:
        with log.phase("project prompts"):
            conditioning = pipeline.project_prompts(sampler.unet, conditioning)
    encoded = "encoded and projected" if project_prompts else "encoded" if waiting is None else "to be encoded in turn"
    log.say(
        f"{len(prompts)} prompts {encoded}; {resolution} px, {checkpoint.sampling}, UNet in {_name(dtype)}, "
        f"VAE in {_name(vae.dtype)}"
    )
    prompt_of = torch.tensor([[index_of[prompt] for prompt in row] for row in phrasings])
    return Generator(image, sampler, conditioning, prompt_of, vae, full_decoder(vae, size), waiting)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
