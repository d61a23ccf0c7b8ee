"""Captured networks: torch.export, sites, profiles, placed quantizers, batch-norm folding."""
