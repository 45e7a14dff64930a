"""What a training run is on disk: its options, its directory, its checkpoints, and the models read from them."""
