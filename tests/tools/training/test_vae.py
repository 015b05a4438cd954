"""The VAE's latents."""

from typing import Any

import torch
from diffusers import AutoencoderKL

from tools.training import layout
from tools.training.vae import normalise_latents


def test_normalised_latents_have_sdxls_scale_and_decode_the_same() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, **vae_blocks())
    vae.post_quant_conv.bias.data += 0.5
    pixels = torch.rand(32, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        spread_before = (
            vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std(dim=(0, 2, 3))[:, None, None]
        )
        normalise_latents(vae, [pixels])
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    means = posterior.mean * layout.LATENT_SCALE
    torch.testing.assert_close(means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(posterior.std * layout.LATENT_SCALE, spread_before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def vae_blocks() -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
