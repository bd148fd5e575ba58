"""The exceptions of this package."""


class TrainingError(ValueError):
    """Training cannot start or go on: the message says what is wrong, what was found and what to do."""


class DivergedError(TrainingError):
    """The loss is no number any more; checkpoints of this training are of no use."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the training after a step, with a checkpoint to go on from.

    Attributes:
        step: steps done.
        signal: number of the signal.
    """

    def __init__(self, step: int, of: int, signal: int) -> None:
        super().__init__(f"interrupted at step {step} of {of}")
        self.step, self.signal = step, signal


class WorseError(TrainingError):
    """The loss is higher than before the training; nothing was saved."""
