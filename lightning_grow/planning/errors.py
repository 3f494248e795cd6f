"""The one error of plans."""


class PlanError(ValueError):
    """A plan, or its file, cannot be read. The message names file and entry, what was found and what was expected."""
