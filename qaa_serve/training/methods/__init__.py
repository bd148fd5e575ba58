"""The ways to train an adapter, by name. A method is one module here that holds a ``METHOD``."""

from qaa_serve.training.methods.base import METHODS, Method, get_method

__all__ = ["METHODS", "Method", "get_method"]
