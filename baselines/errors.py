"""The one error type of this package."""


class BaselineError(ValueError):
    """A baseline that cannot be built or cannot plan; the message names what is wrong and what would be valid."""
