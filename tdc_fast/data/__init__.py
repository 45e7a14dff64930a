"""Image datasets: loading them, the sources of their pixels, and the stream of training batches."""
