"""B between two vectors: diag(lambda_b) S diag(lambda_d), where S is the same signs for every adapter.

As in VeRA (Kopiczko, Blankevoort, Asano, arXiv:2310.11454), whose random matrices are shared by all layers of a
shape, so that two vectors are all that is trained. Here S is signs, and comes from a hash: nobody has to store it,
and every version of every library makes the same.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch


@lru_cache(maxsize=64)
def signs(d_out: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """S, (d_out, columns) float32 of 1 and -1: row by row the bits of SHAKE-256 of "qaa-serve {d_out}x{columns}".

    The first bit is the highest of the first byte; a set one stands for 1.
    """
    stream = hashlib.shake_256(f"qaa-serve {d_out}x{columns}".encode()).digest((d_out * columns + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=d_out * columns)
    with torch.inference_mode(False):  # it is kept, and may be trained with after the first to ask is gone
        return torch.from_numpy(bits.reshape(d_out, columns) * np.float32(2) - np.float32(1)).to(device)


def signs_between(lambda_b: torch.Tensor, lambda_d: torch.Tensor) -> torch.Tensor:
    """B, (d_out, columns), of lambda_b (d_out,) and lambda_d (columns,), on their device."""
    return lambda_b[:, None] * signs(len(lambda_b), len(lambda_d), lambda_d.device) * lambda_d
