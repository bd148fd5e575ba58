"""The one exception of this package."""


class TrainingError(ValueError):
    """Training cannot start or go on: the message says what is wrong, what was found and what to do."""
