"""The gradients of the step before, without a copy where nobody writes into them."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger(__name__)

KEY = "previous_grad"


class KeptGradients:
    """Keeps gradients from one step to the next, in the optimizer's state under ``"previous_grad"``.

    ``zero_grad(set_to_none=True)`` lets go of a gradient, and the next backward pass makes another: then a reference
    is enough. Where something writes into it (``set_to_none=False``, gradients that are views of a bucket, static
    buffers), the reference would silently become the new gradient. Both are seen, by the version and the address of
    the tensor; from then on, copies are kept.

    Args:
        copies: Whether to keep copies from the beginning. Writing through ``.data`` is not seen.
    """

    def __init__(self, copies: bool = False) -> None:
        self.copies = copies
        self._versions: MutableMapping[Tensor, int] = WeakIdKeyDictionary()  # of gradients kept by reference
        self._own: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # copies that may be written into

    def previous(self, states: Sequence[MutableMapping[str, Any]], grads: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the gradients of the step before; None if some were overwritten.

        Args:
            states: The state of each parameter, with a kept gradient.
            grads: The gradients of this step.
        """
        kept = [state[KEY] for state in states]
        intact = [self._is_intact(old, new) for old, new in zip(kept, grads, strict=True)]
        if self.copies or all(intact):
            return kept
        log.info("Gradients are overwritten in place: they are copied after each step from now on.")
        self.copies = True
        return None

    def keep(self, states: Sequence[MutableMapping[str, Any]], grads: Sequence[Tensor], *, owned: bool) -> None:
        """Keep the gradients of this step.

        Args:
            states: The state of each parameter.
            grads: The gradients.
            owned: Whether nobody else holds these tensors.
        """
        for state, grad in zip(states, grads, strict=True):
            kept = state.get(KEY)
            if owned or not self.copies:
                state[KEY] = grad
                self._versions[grad] = grad._version
            elif kept is not None and kept in self._own and kept.shape == grad.shape:
                kept.copy_(grad)
            else:
                state[KEY] = grad.clone()
                self._own[state[KEY]] = True

    def _is_intact(self, kept: Tensor, grad: Tensor) -> bool:
        version = self._versions.pop(kept, None)  # none if it was loaded, or resized: nobody else has it
        return version is None or (kept._version == version and kept.data_ptr() != grad.data_ptr())
