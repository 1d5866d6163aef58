"""The error type of this package."""


class PlanningError(ValueError):
    """A class table that cannot be measured; the message names what is wrong and what would be valid."""
