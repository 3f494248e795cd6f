"""The one error for models that cannot be read or edited."""

from __future__ import annotations


class StructureError(RuntimeError):
    """A model cannot be traced, or an edit cannot be applied to it.

    The message says what was expected, what was found, under which qualified name, and what to do about it.
    Whenever it is raised, the model, its optimizers and its buffers are exactly as they were before the call.
    """
