"""The one exception of this package."""


class InspectionError(ValueError):
    """What was asked for cannot be done: the message says what is wrong, what was found and what to do."""
