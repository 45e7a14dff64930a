"""How good a denoiser is: its loss on held-out images, its samples, and how far they are from real ones."""
