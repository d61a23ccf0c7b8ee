"""Mixbits inside the training code of others: import the module that is named like the trainer."""
