"""What the engine says of its memory and circuits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineAccount:
    """What the engine's workers said of themselves last; nothing, before they have.

    Attributes:
        adapters: id -> bytes in host memory and in slots.
        devices: device -> kind -> bytes.
        circuits: backend -> (bounds, counts of each bucket and beyond, sum in seconds).
    """

    adapters: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    devices: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    circuits: Mapping[str, tuple[list[float], list[int], float]] = field(default_factory=dict)
