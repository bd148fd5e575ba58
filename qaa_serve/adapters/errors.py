"""The error of everything that is wrong with an adapter."""

from typing import ClassVar, Literal


class AdapterError(ValueError):
    """An adapter cannot be used; the message says what is wrong, what was found and what to do.

    Attributes:
        kind: what it was refused for, for those who count.
        temporary: whether the same adapter may be taken later.
    """

    kind: ClassVar[Literal["name", "invalid", "store", "memory", "engine"]] = "invalid"
    temporary: ClassVar[bool] = False
