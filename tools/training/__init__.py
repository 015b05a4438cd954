"""Parts of the training of a checkpoint: critic, VAE, diffusion teacher, one-step student."""
