"""Dense layers, their routed twins, pruning units, width plans, and packing experts into one routed model."""
