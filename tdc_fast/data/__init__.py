"""Datasets of images and of latents: loading them, the sources of their pixels, and the stream of training batches."""
