"""Images to train on and to compare with: datasets, where their pixels come from, and the stream of batches."""
