"""Denoisers whose layers can be routed."""
