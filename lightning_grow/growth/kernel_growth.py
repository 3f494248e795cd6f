"""Kernel-size growth of network morphism: convolutions that see further, and compute the same at first.

Wei, Wang, Rui, Chen, "Network Morphism", ICML 2016, arXiv:1603.01670.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_grow.planning.patterns import matches, near
from lightning_grow.structure.axes import Structure
from lightning_grow.surgery.kernels import KernelEdit, enlarge, obstacle_to_kernels
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import Proposal
from lightning_grow.trainer.structural_callback import StructuralCallback


def larger_kernels(
    model: nn.Module, names: Iterable[str], *, amount: int = 2, max_kernel_size: int = 7
) -> list[KernelEdit]:
    r"""Plan larger kernels for some convolutions: zeros around what they are, and as much more padding.

    A kernel of size :math:`K` becomes :math:`\tilde K = K + a`: :math:`\tilde W` is :math:`W` in the middle and zero
    elsewhere, and the padding grows by :math:`d \, a / 2` with the dilation :math:`d`. The function is exactly the
    same, for any stride and any number of groups. The new entries have a gradient from the first step on.

    Args:
        model: The model; only read.
        names: Qualified names of convolutions. One whose weight another of them shares is left out.
        amount: What is added along each dimension, an even number of at least 2.
        max_kernel_size: No dimension becomes longer than this.

    Returns:
        One edit for each convolution that can still grow along some dimension, for `enlarge_` or as proposals. Nothing
        is changed yet.

    Raises:
        StructureError: If a module is no ordinary convolution, or its border mirrors or wraps the image.
        ValueError: If ``amount`` is not an even number of at least 2.

    Example:
        >>> from lightning_grow.surgery import enlarge_
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
        >>> enlarge_(model, larger_kernels(model, ["0", "2"]))
        >>> [(conv.kernel_size, conv.padding) for conv in (model[0], model[2])]
        [((5, 5), (2, 2)), ((5, 5), (1, 1))]

    Reference:
        Wei et al., "Network Morphism", ICML 2016, arXiv:1603.01670.
    """
    if amount < 2 or amount % 2:
        raise ValueError(f"Expected `amount` to be an even number of at least 2, found {amount!r}.")
    edits: dict[int, KernelEdit] = {}
    for name in names:
        now = enlarge(model, name).before
        after = tuple(size + min(amount, max(0, max_kernel_size - size) // 2 * 2) for size in now)
        if after != now:
            edits.setdefault(id(model.get_parameter(f"{name}.weight")), KernelEdit(name, now, after))
    return list(edits.values())


class KernelGrowth(StructuralCallback):
    """Enlarges the kernels of convolutions by rings of zeros, which then learn; the function stays the same.

    Args:
        modules: Which convolutions: glob patterns of their qualified names, of which ``"!pattern"`` excludes; all by
            default. Those that cannot grow and keep the function are left alone, as `enlarge` refuses them.
        amount: What is added to a kernel along each dimension at an event, an even number.
        max_kernel_size: No kernel becomes longer than this.
        pointwise: Whether convolutions with a kernel of 1 grow, too.
        **common: When, and how far; see `StructuralCallback`. ``groups``, ``num_units`` and ``fraction`` are about
            units, and refused. Under a budget, kernels that do not fit any more stay as they are, the last ones first.

    Example::

        trainer = L.Trainer(callbacks=[lg.KernelGrowth(every_n_epochs=5, max_kernel_size=7, modules=["stages.*"])])
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        amount: int = 2,
        max_kernel_size: int = 7,
        pointwise: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name in ("groups", "num_units", "fraction"):
            if getattr(self, name) is not None:
                raise MisconfigurationException(
                    f"KernelGrowth has no `{name}`: it adds no units. Choose convolutions by `modules`, and by "
                    "`amount` how much their kernels grow."
                )
        if amount < 2 or amount % 2:
            raise MisconfigurationException(f"`amount` should be an even number of at least 2, found {amount!r}.")
        if max_kernel_size < 3:
            raise MisconfigurationException(f"`max_kernel_size` should be at least 3, found {max_kernel_size!r}.")
        self.modules = modules
        self.amount = amount
        self.max_kernel_size = max_kernel_size
        self.pointwise = pointwise
        self._state_key = self._generate_state_key(common=self._state_key, modules=modules)

    @override
    def check_scope(self, model: nn.Module, structure: Structure) -> None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]  # noqa: SLF001
        for pattern in self.modules or []:
            bare = pattern.removeprefix("!")
            if not any(matches(name, bare) for name in names):
                raise MisconfigurationException(
                    f"`modules` names '{bare}', but no convolution of this model matches it.{near(bare, names)} "
                    f"Convolutions: {', '.join(names) or 'none'}."
                )
        if not self._chosen(model):
            reasons = [f"'{name}': {reason}" for name in names if (reason := obstacle_to_kernels(model, name))]
            raise MisconfigurationException(
                "No kernel of this model may grow. "
                + ("; ".join(reasons) or f"Convolutions: {', '.join(names) or 'none'}.")
            )

    @override
    def propose(self, occasion: Occasion) -> Sequence[Proposal]:
        model = occasion.model
        edits = larger_kernels(model, self._chosen(model), amount=self.amount, max_kernel_size=self.max_kernel_size)
        return [Proposal(edit) for edit in edits]

    def _chosen(self, model: nn.Module) -> list[str]:
        """Return the convolutions that the patterns choose, without those that cannot grow."""
        patterns = self.modules or []
        includes = [p for p in patterns if not p.startswith("!")] or ["*"]
        excludes = [p[1:] for p in patterns if p.startswith("!")]
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001
            and any(matches(name, p) for p in includes)
            and not any(matches(name, p) for p in excludes)
            and (self.pointwise or max(module.kernel_size) > 1)
            and obstacle_to_kernels(model, name) is None
        ]
