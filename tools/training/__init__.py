"""Parts of the training of the embedded checkpoint: critic, VAE, diffusion teacher, one-step student."""
