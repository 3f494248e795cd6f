"""The gradients of steps before, without a copy where nobody writes into them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)

KEY = "previous_grad"


class KeptGradients:
    """Keeps gradients from one step to the next, in the state of an optimizer.

    ``zero_grad(set_to_none=True)`` lets go of a gradient, and the next backward pass makes another: then a reference
    is enough. Where something writes into it (``set_to_none=False``, gradients that are views of a bucket, static
    buffers), the reference would silently become the new gradient. Both are seen, by the version and the address of
    the tensor; from then on, copies are kept: the option ``copy_grad`` of the param group becomes True, and goes with
    the state of the optimizer. Writing through ``.data`` is not seen.
    """

    def __init__(self) -> None:
        self._references: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # with their versions

    def are_intact(self, group: dict[str, Any], kept: Iterable[Tensor], grads: Iterable[Tensor | None]) -> bool:
        """Return whether gradients are what they were when they were kept; if not, copies are made from now on.

        Args:
            group: The param group.
            kept: Gradients of a step before.
            grads: The gradient that the same parameter has now, after another backward pass; None if it has none.
        """
        if group["copy_grad"] or all(self._is_intact(old, new) for old, new in zip(kept, grads, strict=True)):
            return True
        log.info("Gradients are overwritten in place: they are copied after each step from now on.")
        group["copy_grad"] = True
        return False

    def keep(
        self,
        group: dict[str, Any],
        states: Sequence[MutableMapping[str, Any]],
        grads: Sequence[Tensor],
        *,
        owned: bool,
        key: str = KEY,
    ) -> None:
        """Keep the gradients of this step in place of those of the step before.

        Args:
            group: The param group.
            states: The state of each parameter.
            grads: The gradients.
            owned: Whether nobody else holds these tensors.
            key: Their name in the state.
        """
        copies = group["copy_grad"] and not owned
        for state, grad in zip(states, grads, strict=True):
            kept = state.get(key)
            if copies and kept is not None and kept.shape == grad.shape and self._reference(kept) is None:
                kept.copy_(grad)
                continue
            self._references.pop(id(kept), None)
            state[key] = grad.clone() if copies else grad
            if not copies:
                self._references[id(grad)] = weakref.ref(grad), grad._version

    def _reference(self, kept: Tensor) -> int | None:
        """Return the version that somebody else's tensor had; None for our own: copied, loaded or resized."""
        found = self._references.get(id(kept))
        return None if found is None or found[0]() is not kept else found[1]

    def _is_intact(self, kept: Tensor, grad: Tensor | None) -> bool:
        version = self._reference(kept)
        if version is None:
            return True
        return kept._version == version and (grad is None or kept.data_ptr() != grad.data_ptr())
