r"""What a model predicts, found where its loss is computed: the curvature of the loss at the outputs.

With outputs :math:`f` and a loss that is a negative log-likelihood, the Gauss-Newton matrix of the loss is
:math:`H = E[\xi \xi^T]` with :math:`\xi = \partial_f(-\log p(\tilde y))` and labels :math:`\tilde y` that the *model*
predicts, not those of the data. Such :math:`\xi`, propagated back, give the curvature of anything in the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_grow.criteria.objective import MeasurementError

LikelihoodName = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]
"""Which calls tell what a model predicts: all of them, or one kind."""

Labels = Literal["exact", "signs", "sampled", "true"]
"""Labels for the curvature: all that the model thinks possible, one by one or mixed by random signs; drawn from what it
predicts; or those of the data."""

_KINDS: Mapping[Any, LikelihoodName] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.mse_loss: "mse",
}
_SIGNATURES = {function: inspect.signature(function) for function in _KINDS}


@dataclass(frozen=True, eq=False)
class Term:
    """One call of a loss function.

    Attributes:
        function: Which.
        arguments: Its arguments by name; ``input`` is what gradients are taken with respect to.
        value: What it returned.
    """

    function: Any
    arguments: Mapping[str, Any]
    value: Tensor

    @property
    def outputs(self) -> Tensor:
        """The model's outputs, as the loss function got them."""
        outputs: Tensor = self.arguments["input"]
        return outputs


class Likelihood(TorchFunctionMode):
    """Notes the calls of ``F.cross_entropy``, ``F.nll_loss``, ``F.mse_loss`` and the like while a loss is computed.

    Args:
        name: Which kinds of calls count.

    Attributes:
        terms: The calls, in order.

    Example:
        >>> logits, labels = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
        >>> with Likelihood() as likelihood:
        ...     loss = F.cross_entropy(logits, labels)
        >>> samples, draws = likelihood.draws(loss, torch.Generator())
        >>> samples, len(draws)  # one for each class
        (4, 3)
    """

    def __init__(self, name: LikelihoodName = "auto") -> None:
        super().__init__()
        self.name = name
        self.terms: list[Term] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let a loss function read the outputs through a view of its own."""
        kind = _KINDS.get(func)
        if kind is None or self.name not in ("auto", kind):
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURES[func].bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        outputs = bound.arguments["input"]
        if not torch.is_grad_enabled() or not outputs.requires_grad:
            return func(*args, **(kwargs or {}))
        bound.arguments["input"] = outputs.view_as(outputs)
        value = func(*bound.args, **bound.kwargs)
        self.terms.append(Term(func, dict(bound.arguments), value))
        return value

    def draws(
        self, loss: Tensor, generator: torch.Generator, labels: Labels = "exact", num_draws: int = 1
    ) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        r"""Return what to propagate back from the outputs so that squares add up to the curvature of the loss.

        For a direction :math:`d` of the outputs, :math:`\sum_j (\sum_n \xi_{jn} d_n)^2` is, or has as expectation,
        :math:`d^T H d`, if the sums over samples are squared one by one.

        Args:
            loss: The whole loss, a mean over samples, of which the noted calls are a part.
            generator: Draws labels, and signs where one sample has several outputs of its own (positions of a
                sequence), so that they do not add up.
            labels: ``"exact"`` takes all labels, one draw for each class (for squared errors: for each output of a
                sample). ``"signs"`` mixes them, :math:`\sum_c s_c \sqrt{p_c} (p - e_c)` with signs of its own for
                each sample, which has the right expectation, and little variance where the model is confident.
                ``"sampled"`` draws a label from what the model predicts. ``"true"`` takes the labels of the data: the
                *empirical Fisher*, no curvature, to compare with.
            num_draws: How many draws of signs or labels.

        Returns:
            The number of samples, and pairs of outputs and :math:`\xi`, in the shape of the outputs.

        Raises:
            MeasurementError: If no noted call is part of the loss, its labels are themselves computed with trained
                weights, or it enters with a negative weight.
        """
        weights = (
            torch.autograd.grad(loss, [t.value for t in self.terms], retain_graph=True, allow_unused=True)
            if (self.terms and loss.requires_grad)
            else ()
        )
        terms = [(t, w) for t, w in zip(self.terms, weights, strict=False) if w is not None and bool(w.any())]
        if not terms:
            wanted = "F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits or F.mse_loss"
            wanted = wanted if self.name == "auto" else f"a {self.name} loss"
            raise MeasurementError(
                f"The loss does not go through {wanted}: there are no labels, or they are hidden, so that what the "
                "model predicts is not known. A Gauss-Newton curvature needs it."
            )
        found: list[tuple[Tensor, Tensor]] = []
        for term, weight in terms:
            if isinstance(term.arguments["target"], Tensor) and term.arguments["target"].requires_grad:
                raise MeasurementError("The labels of the loss are computed with trained weights: they are no labels.")
            if bool((weight < 0).any()):
                raise MeasurementError("A likelihood enters the loss with a negative weight: that is no loss to curve.")
            if labels == "true":
                gradient = torch.autograd.grad(loss, [term.outputs], retain_graph=True)[0].detach()
                found.append((term.outputs, gradient * len(gradient) ** 0.5))
                continue
            drawn = _classes if _KINDS[term.function] == "cross_entropy" else _numbers
            with torch.no_grad():
                found += [(term.outputs, xi) for xi in drawn(term, weight, generator, labels, num_draws)]
        return min(_rows(term) for term, _ in terms), found


def num_labels(terms: Sequence[Term]) -> int:
    """Return how many draws the exact mean over labels takes."""
    return sum(
        t.outputs.shape[_class_dim(t.outputs)]
        if _KINDS[t.function] == "cross_entropy"
        else max(1, t.outputs.numel() // max(1, _rows(t)))
        for t in terms
    )


def _rows(term: Term) -> int:
    """Return the first dimension of the outputs; 1 for those of a single sample."""
    outputs = term.outputs
    if _KINDS[term.function] == "cross_entropy" and outputs.ndim == 1:
        return 1
    return outputs.shape[0] if outputs.ndim else 1


def _class_dim(outputs: Tensor) -> int:
    return 0 if outputs.ndim == 1 else 1


def _signs(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, tuple(shape), generator=generator) * 2 - 1
    return signs.to(like)


def _classes(term: Term, weight: Tensor, generator: torch.Generator, labels: Labels, num_draws: int) -> list[Tensor]:
    r"""Return :math:`\sqrt{c_r p_c}(p - e_c)` for all classes, mixtures of them, or some drawn from :math:`p`."""
    dim = _class_dim(term.outputs)
    outputs = term.outputs.detach().movedim(dim, -1)
    p = (outputs.softmax(-1) if term.function is F.cross_entropy else outputs.exp()).double()
    # of log-probabilities the gradient is -e; what is missing of p - e is orthogonal to all that they can do
    mean = p if term.function is F.cross_entropy else torch.zeros_like(p)
    scale = _class_weights(term, weight).clamp(min=0).sqrt()[..., None].to(p)
    found = []
    if labels == "exact":
        for c in range(p.shape[-1]):
            one = torch.zeros_like(p)
            one[..., c] = 1
            signs = _signs(p.shape[:-1], p, generator)[..., None]
            found.append(signs * scale * p[..., c : c + 1].sqrt() * (mean - one))
    elif labels == "signs":
        for _ in range(num_draws):
            root = _signs(p.shape, p, generator) * p.sqrt()
            found.append(scale * (root.sum(-1, keepdim=True) * mean - root) / num_draws**0.5)
    else:
        flat = p.reshape(-1, p.shape[-1]).cpu()
        for _ in range(num_draws):
            drawn = torch.multinomial(flat, 1, generator=generator).reshape(p.shape[:-1]).to(p.device)
            found.append(scale * (mean - F.one_hot(drawn, p.shape[-1])) / num_draws**0.5)
    return [xi.movedim(-1, dim).to(term.outputs) for xi in found]


def _class_weights(term: Term, weight: Tensor) -> Tensor:
    """Return the factor of the curvature of each row: the weight of its labels in the whole loss."""
    arguments, target = term.arguments, term.arguments["target"]
    classes = term.outputs.shape[_class_dim(term.outputs)]
    by_class = arguments["weight"]
    by_class = torch.ones(classes, device=term.outputs.device) if by_class is None else by_class
    by_class, weight = by_class.double(), weight.double()  # in float32, weights of rows would be good to 8 digits only
    if target.is_floating_point():
        mass = (target.movedim(_class_dim(target), -1) * by_class).sum(-1)
        smooth = arguments.get("label_smoothing", 0.0)
        mass = (1 - smooth) * mass + smooth * by_class.mean()
        total: Tensor | float = mass.numel()
    else:
        valid = target != arguments["ignore_index"]
        own = by_class[target.clamp(0, classes - 1)] * valid
        smooth = arguments.get("label_smoothing", 0.0)
        mass = (1 - smooth) * own + smooth * by_class.mean() * valid
        total = own.sum()
    factor: Tensor = weight * mass / total if arguments["reduction"] == "mean" else weight * mass
    return factor


def _numbers(term: Term, weight: Tensor, generator: torch.Generator, labels: Labels, num_draws: int) -> list[Tensor]:
    r"""Return :math:`\sqrt{h}` with random signs: noise of the covariance of independent outputs."""
    outputs, arguments = term.outputs.detach(), term.arguments
    target = torch.as_tensor(arguments["target"]).to(outputs.device)
    h = torch.full_like(outputs, 2.0, dtype=torch.float64)
    if term.function is F.binary_cross_entropy_with_logits:
        p = outputs.double().sigmoid()
        h = p * (1 - p)
        if arguments["pos_weight"] is not None:
            h = h * (1 + (arguments["pos_weight"] - 1) * target)
    if arguments["weight"] is not None:
        h = h * arguments["weight"]
    h = h * weight
    if arguments["reduction"] == "mean":
        # F.mse_loss divides by the weights that it is given, the other by the number of outputs
        weighted = term.function is F.mse_loss and arguments["weight"] is not None
        h = h / (arguments["weight"].expand_as(outputs).sum() if weighted else outputs.numel())
    scale = h.clamp(min=0).sqrt()
    rows = _rows(term)
    each = outputs.numel() // max(1, rows)
    if labels == "exact":
        flat = scale.reshape(rows, each)
        picked = [
            torch.where(torch.arange(each, device=flat.device) == d, flat, flat.new_zeros(())) for d in range(each)
        ]
        signs = _signs((rows, each), scale, generator)
        return [(signs * xi).reshape(outputs.shape).to(outputs) for xi in picked]
    return [(scale * _signs(outputs.shape, scale, generator) / num_draws**0.5).to(outputs) for _ in range(num_draws)]
