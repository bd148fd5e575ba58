"""The one exception of this package."""


class AdapterError(ValueError):
    """An adapter cannot be used: the message says what is wrong, what was found and what to do."""
