"""Circuits in one Triton kernel: ``host`` in Python, ``kernel`` on a GPU."""
