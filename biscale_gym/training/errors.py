"""What can be wrong with a training run."""


class TrainingError(ValueError):
    """A run that cannot be made or resumed as asked; the message names the place and the nearest valid choice."""
