"""Dense layers, routed layers, pruning units, width plans, and packing experts into one routed model."""
