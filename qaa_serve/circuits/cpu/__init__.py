"""Circuits compiled for a CPU: ``host``, ``serving``, ``training`` in Python, ``forward``, ``backward`` compiled."""
