"""The error of everything that is wrong with an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self, TypeAlias

_MAX_MESSAGE = 1000

#: What an adapter may be refused for, for those who count.
Kind: TypeAlias = Literal["name", "invalid", "store", "memory", "engine", "source"]


class AdapterError(ValueError):
    """An adapter cannot be used; the message says what is wrong, what was found and what to do.

    A message is one line of printable text, whatever the files held that it speaks of: it goes to terminals, logs
    and clients.

    Attributes:
        kind: what it was refused for, for those who count.
        temporary: whether the same adapter may be taken later.
    """

    kind: Kind = "invalid"
    temporary: bool = False

    def __init__(self, message: str):
        text = " ".join(message.splitlines())
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        if len(text) > _MAX_MESSAGE:  # what to do is said at the end
            text = f"{text[: _MAX_MESSAGE - 305]} ... {text[-300:]}"
        super().__init__(text)

    def __copy__(self) -> Self:
        """The same error, whatever its class takes to be made, without its traceback."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


def shown(value: object) -> str:
    """What was found, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def only_refusals(what: str) -> Iterator[None]:
    """Turn whatever goes wrong into an AdapterError: one adapter must not end the work on the others.

    Args:
        what: what is being read, for the message of what nobody foresaw.
    """
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # MemoryError, OSError and RecursionError are among them, Ctrl-C is not
        found = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise AdapterError(f"{what} cannot be read ({found}); save the adapter again") from error
