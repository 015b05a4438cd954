"""Image numbers to pixels: which checkpoint, its steps, latents to pixels, by which decoder."""
