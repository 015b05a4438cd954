"""Image numbers to pixels: which checkpoint, its one step, latents to pixels, by which decoder."""
