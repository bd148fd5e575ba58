"""Many quantum-circuit adapters on one language model: circuits, adapters, server, training."""

__version__ = "0.1.0"
