"""Circuits in Triton: ``host`` with ``kernel`` for serving, ``training`` with ``backward`` for gradients."""
