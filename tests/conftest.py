"""What every test runs under."""

from __future__ import annotations

from hypothesis import settings

# No deadline: the first example of a test may import torch or build a network, and machines are shared.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)  # `make slow`
settings.load_profile("quick")
