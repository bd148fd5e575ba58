"""Circuits compiled for a CPU: ``host``, ``serving`` and ``training`` call ``forward`` and ``backward``."""
