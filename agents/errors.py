"""The one error type of this package."""


class AgentError(ValueError):
    """A controller that cannot be built or cannot plan; the message names what is wrong and what would be valid."""
