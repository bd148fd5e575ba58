"""Public adapter names and the revisions behind them."""

from qaa_serve.registry.directory import Rejection, scan
from qaa_serve.registry.revisions import NAME_PATTERN, Revision, check_name, read_revision

__all__ = ["NAME_PATTERN", "Rejection", "Revision", "check_name", "read_revision", "scan"]
