"""Quantizers: modules that sit on an edge of a captured network."""
