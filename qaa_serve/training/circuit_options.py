"""The options of a circuit: QAAConfig's fields, and those of ``--method qaa``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qaa_serve.training.fields import option

_GROUP = "the adapter"


@dataclass
class CircuitOptions:
    """What the circuits are, as adapter_config.json says it.

    ``qaa_serve.adapters.AdapterConfig`` checks the values; a test holds the two to the same names and defaults.
    But an adapter whose file says nothing of ``inputs`` and ``whitened`` is older than both, and has neither.
    """

    ansatz: Literal["ryrz_ring_ry", "ry_ring", "strongly_entangling"] = option(
        "ryrz_ring_ry", "form of the circuit", group=_GROUP
    )
    layers: int = option(2, "layers of the circuit", group=_GROUP)
    alpha: float = option(16.0, "size of the adapter's update", group=_GROUP, above=0)
    heads: int = option(1, "circuits a layer, which multiply B's columns", group=_GROUP)
    readouts: int | None = option(
        None,
        "expectation values a circuit, Z on each qubit and then on pairs (default: one a qubit)",
        group=_GROUP,
    )
    constant: bool = option(
        False, "embed a constant beside the input, so that the circuit sees the input's sign", group=_GROUP
    )
    length: bool = option(False, "multiply what is read out by the input's length", group=_GROUP)
    inputs: Literal["raw", "rms", "centred-rms"] = option(
        "centred-rms",
        "what is done to a layer's input, channel by channel, before it is embedded: nothing, divided by its root "
        "mean square, or to mean 0 and spread 1",
        group=_GROUP,
    )
    whitened: bool = option(True, "bring each readout to mean 0 and spread 1", group=_GROUP)
    vectors: bool = option(
        False,
        "train two vectors in place of B, between which fixed signs stand; all pairs are read out by default",
        group=_GROUP,
    )
