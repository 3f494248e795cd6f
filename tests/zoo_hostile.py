"""Models made to mislead: what is found in them must be right, and where nothing can be right it must be pinned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.zoo_entry import Model, Width, entry, normal, pooled, tokens, weight

HIDDEN = "hidden.weight[0] hidden.bias[0]"


def between(function: Any, units: int = 8, left: int | None = None, **parts: Any) -> nn.Module:
    """A perceptron with ``function(model, hidden)`` between its two layers, of which ``left`` units come out."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(function(self, self.hidden(x)))

    return Model(forward, hidden=nn.Linear(5, units), head=nn.Linear(left or units, 3), **parts)


# Small numbers, where sizes say nothing


@entry(normal(6, 5), Width("0.weight[0] 0.bias[0] 2.weight[1]", 1), Width("2.weight[0] 2.bias[0] 4.weight[1]", 1))
def one_unit() -> nn.Module:
    """A seed to grow from may have a single unit; it is still a width."""
    return nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3))


@entry(
    normal(3, 1, 5, 5),
    Width("0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 1.running_mean[0] 3.weight[1]", 1),
    Width("3.weight[0] 3.bias[0] 7.weight[1]", 2),
)
def one_channel() -> nn.Module:
    layers = (nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Tanh(), nn.Conv2d(1, 2, 3), nn.ReLU())
    return nn.Sequential(*pooled(*layers), nn.Linear(2, 3))


@entry(normal(1, 1), Width("0.weight[0] 0.bias[0] 2.weight[1]", 2))
def one_feature_and_one_sample() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))


# Mixing along the hidden axis: widening would change the function


@entry(normal(6, 5), Width(HIDDEN, obstacle=True), obstacles_only=True)
def softmax_over_units() -> nn.Module:
    return between(lambda self, h: h.softmax(-1))


@entry(normal(6, 5), Width(HIDDEN, obstacle=True), obstacles_only=True)
def normalized_units() -> nn.Module:
    return between(lambda self, h: F.normalize(h, dim=-1))


@entry(normal(3, 3, 5, 5), obstacles_only=True)
def mean_over_channels() -> nn.Module:
    """Spatial attention looks at the mean and the maximum over all channels."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        view = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return self.head((x * torch.sigmoid(self.look(view))).mean((2, 3)))

    convs = {"stem": nn.Conv2d(3, 6, 3), "look": nn.Conv2d(2, 1, 3, padding=1)}
    return Model(forward, **convs, head=nn.Linear(6, 3))


@entry(normal(6, 5), obstacles_only=True)
def sum_of_units() -> nn.Module:
    """Nothing consumes the units: no new unit can be silent."""
    return Model(lambda self, x: torch.relu(self.hidden(x)).sum(-1), hidden=nn.Linear(5, 8))


@entry(normal(6, 5), obstacles_only=True)
def units_against_units() -> nn.Module:
    """Activations are contracted with activations, and with weights as well."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        return torch.cat([h @ h.t(), self.head(h)], dim=1)

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))


@entry(normal(6, 5), obstacles_only=True)
def order_matters() -> nn.Module:
    return between(lambda self, h: torch.cumsum(h, -1) + torch.sigmoid(h))


@entry(normal(6, 5), obstacles_only=True)
def units_as_a_sequence() -> nn.Module:
    """A convolution slides over the units."""
    return between(lambda self, h: torch.relu(self.conv(h.unsqueeze(1))).squeeze(1), conv=nn.Conv1d(1, 1, 3, padding=1))


@entry(normal(6, 5))
def mirrored_units() -> nn.Module:
    """Unit i meets unit n-1-i: new units at the end would meet old ones."""
    return between(lambda self, h: torch.relu(h + h.flip(-1)))


@entry(normal(6, 5))
def rolled_units() -> nn.Module:
    return between(lambda self, h: torch.relu(h) * torch.roll(h, 1, -1))


@entry(normal(6, 5))
def sorted_units() -> nn.Module:
    return between(lambda self, h: h.sort(-1).values)


@entry(normal(6, 5))
def maxout() -> nn.Module:
    return between(lambda self, h: h.view(h.shape[0], -1, 2).amax(-1), units=12, left=6)


@entry(normal(6, 5))
def bilinear_form_of_one_vector() -> nn.Module:
    """The same units are consumed on two axes of one weight."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return torch.einsum("bi,oij,bj->bo", h, self.form, h)

    return Model(forward, hidden=nn.Linear(5, 6), form=weight(3, 6, 6))


# Parts of an axis


@entry(normal(6, 5))
def slices_by_number() -> nn.Module:
    return between(lambda self, h: torch.cat([h[:, :3].relu(), h[:, 3:].tanh()], -1))


@entry(normal(6, 5))
def every_other_unit() -> nn.Module:
    return between(lambda self, h: torch.tanh(h[:, ::2]), left=4)


@entry(normal(6, 5))
def first_unit_as_a_gate() -> nn.Module:
    return between(lambda self, h: torch.relu(h) * torch.sigmoid(h[:, :1]))


@entry(normal(6, 5))
def halves_swapped() -> nn.Module:
    """Rotary embeddings do this to the head dimension."""

    def rotate(self: Any, h: Tensor) -> Tensor:
        half = h.shape[-1] // 2
        return torch.relu(h) + torch.cat([-h[:, half:], h[:, :half]], dim=-1)

    return between(rotate)


@entry(normal(6, 5))
def units_by_index_buffer() -> nn.Module:
    def pick(self: Any, h: Tensor) -> Tensor:
        return torch.relu(h[:, self.order])

    model = between(pick)
    model.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 5, 6, 4]))
    return model


@entry(normal(2, 3, 4, 4), Width("0.weight[0] 0.bias[0] 2.weight[1]"), Width("2.weight[0] 2.bias[0]", obstacle=None))
def pixel_shuffle() -> nn.Module:
    layers = (nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 1), nn.PixelShuffle(2), nn.ReLU())
    return nn.Sequential(*pooled(*layers), nn.Linear(3, 2))


@entry(
    normal(6, 5),
    Width("a.weight[0] a.bias[0] b.weight[1] c.weight[1] head.weight[1]", 4),
    Width("b.weight[0] c.weight[1] head.weight[1]", 3),
    Width("c.weight[0] head.weight[1]", 2),
)
def dense_connections() -> nn.Module:
    """Every layer reads all before it, newest first."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.cat([torch.relu(layer(x)), x], dim=-1)
        return self.head(x)

    layers = {"a": nn.Linear(5, 4), "b": nn.Linear(9, 3), "c": nn.Linear(12, 2), "head": nn.Linear(14, 3)}
    return Model(forward, **layers)


# Weights made of other tensors


@entry(normal(6, 5), Width("0.parametrizations.weight.original1[0] 0.bias[0] 2.weight[1]", 8, obstacle=None))
def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))


@entry(normal(6, 5), Width("down.weight[0] up.weight[1]", 2), Width("base.weight[0] up.weight[0] head.weight[1]", 8))
def low_rank_update() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x) + self.up(self.down(x))))

    low = {"down": nn.Linear(5, 2, bias=False), "up": nn.Linear(2, 8, bias=False)}
    return Model(forward, base=nn.Linear(5, 8), **low, head=nn.Linear(8, 3))


@entry(normal(6, 5), Width("down[0] up[1]", 2, obstacle=None), Width("weight[0] up[0] head.weight[1]", 8))
def merged_low_rank_update() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.linear(x, self.weight + self.up @ self.down)))

    return Model(forward, weight=weight(8, 5), up=weight(8, 2), down=weight(2, 5), head=nn.Linear(8, 3))


@entry(normal(6, 5), Width(f"{HIDDEN} hidden.weight_mask[0] head.weight[1] head.weight_mask[1]", 8))
def masked_weights() -> nn.Module:
    """A mask in the shape of a weight, as unstructured pruning leaves it, moves with the weight."""

    class Masked(nn.Linear):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs)
            self.register_buffer("weight_mask", (torch.rand(outputs, inputs) > 0.3).float())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.weight_mask, self.bias)

    return Model(lambda self, x: self.head(self.hidden(x).relu()), hidden=Masked(5, 8), head=Masked(8, 3))


@entry(
    normal(6, 5),
    Width("up[2] middle[1]", 6),
    Width("middle[2] down[1]", 6),
    Width("router.weight[0] up[0] middle[0] down[0]", 3, obstacle=True),
)
def mixture_of_experts() -> nn.Module:
    """The weights of all experts lie in one tensor."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("bi,eih->beh", x, self.up))
        hidden = torch.relu(hidden.transpose(0, 1).bmm(self.middle))
        return (torch.einsum("ebh,eho->beo", hidden, self.down) * self.router(x).softmax(-1).unsqueeze(-1)).sum(1)

    experts = {"up": weight(3, 5, 6), "middle": weight(3, 6, 6), "down": weight(3, 6, 2)}
    return Model(forward, router=nn.Linear(5, 3), **experts)


@entry(
    normal(6, 5),
    Width("main.weight[0] main.bias[0] film.weight[0] film.bias[0] head.weight[1]", 8),
    Width("cond.weight[0] film.weight[1]", 4),
)
def feature_modulation() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale, shift = self.film(torch.relu(self.cond(x))).chunk(2, -1)
        return self.head(torch.relu(self.main(x) * (1 + scale) + shift))

    parts = {"main": nn.Linear(5, 8), "cond": nn.Linear(5, 4), "film": nn.Linear(4, 16), "head": nn.Linear(8, 3)}
    return Model(forward, **parts)


@entry(normal(6, 5))
def weights_from_a_network() -> nn.Module:
    """One layer's output is reshaped into the weight of another."""

    def forward(self: Any, x: Tensor) -> Tensor:
        generated = self.maker(x.mean(0)).view(-1, x.shape[1])
        return self.head(torch.relu(x @ generated.t()))

    return Model(forward, maker=nn.Linear(5, 40), head=nn.Linear(8, 3))


# Boundaries and state


@entry(normal(6, 5), pinned="hidden.weight[0] hidden.bias[0] head.weight[1]")
def hidden_is_an_output() -> nn.Module:
    def forward(self: Any, x: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.hidden(x))
        return {"features": features, "logits": self.head(features)}

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))


@entry(normal(6, 5), pinned="hidden.weight[0] hidden.bias[0] head.weight[1]")
def residual_on_the_input() -> nn.Module:
    """The width of the stream is that of the data."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(x + torch.relu(self.hidden(x)))

    return Model(forward, hidden=nn.Linear(5, 5), head=nn.Linear(5, 3))


@entry(normal(6, 5), Width("hidden.weight[0] head.weight[1]", 8), pinned="spare.weight[0] spare.weight[1]")
def unused_layer() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x)))

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3), spare=nn.Linear(8, 8))


@entry(normal(6, 5), Width(f"{HIDDEN} mean[0] gain[0] head.weight[1]", 8))
def statistics_in_buffers() -> nn.Module:
    """A running mean kept by hand, written in place in train mode; the second buffer is not saved."""

    def centre(self: Any, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return torch.relu((h - self.mean) * self.gain)

    model = between(centre)
    model.register_buffer("mean", torch.randn(8))
    model.register_buffer("gain", torch.linspace(0.5, 1.5, 8), persistent=False)
    return model


@entry(tokens(9, 3, 4), Width("embed.weight[1] cls[2] positions[2] query.weight[1] head.weight[1]", obstacle=None))
def learned_tokens() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1) + self.positions
        scores = self.query(torch.tanh(x)).softmax(1)
        return self.head((x * scores).sum(1))

    learned = {"cls": weight(1, 1, 6), "positions": weight(1, 5, 6)}
    return Model(forward, embed=nn.Embedding(9, 6), **learned, query=nn.Linear(6, 1), head=nn.Linear(6, 3))


@entry(tokens(9, 3, 4), Width("bag.weight[1] head.weight[1]", 6), pinned="bag.weight[0]")
def embedding_bag() -> nn.Module:
    return Model(lambda self, ids: self.head(self.bag(ids)), bag=nn.EmbeddingBag(9, 6), head=nn.Linear(6, 3))


@entry(
    normal(6, 5),
    Width(f"{HIDDEN} inner.0.weight[1]", 8),
    Width("inner.0.weight[0] inner.2.weight[1]", 7),
    Width("inner.2.weight[0] scale[0] head.weight[1]", 6),
)
def recomputed_segment() -> nn.Module:
    """Activation checkpointing, a scalar parameter, and a layer scale."""

    def forward(self: Any, h: Tensor) -> Tensor:
        h = checkpoint(self.inner, torch.relu(h), use_reentrant=False)
        return torch.relu(h) * self.scale * self.temperature

    inner = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6))
    return between(forward, left=6, inner=inner, scale=weight(6), temperature=weight())


@entry(normal(6, 5), Width(f"{HIDDEN} head.weight[1]", 8))
def buffers_written_in_eval_mode() -> nn.Module:
    """A count of calls and a running mean of the input: looking at the model must not advance them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.seen.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.head(torch.relu(self.hidden(x - self.seen / self.calls)))

    model = Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))
    model.register_buffer("calls", torch.tensor(0))
    model.register_buffer("seen", torch.zeros(5))
    return model


@entry(tokens(9, 3, 4), Width("hidden.weight[0] head.weight[1]", 7), pinned="embed.weight[0]")
def embedding_renormalized_in_place() -> nn.Module:
    """Each look-up shortens the rows that are too long, in the weight itself."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embed(ids))))

    layers = {"hidden": nn.Linear(6, 7), "head": nn.Linear(7, 3)}
    return Model(forward, embed=nn.Embedding(9, 6, max_norm=0.5), **layers)


@entry(normal(6, 5), Width(f"{HIDDEN} inner.weight[0] inner.weight[1] head.weight[1]", 8))
def steps_and_branches_by_input() -> nn.Module:
    """How often a layer runs, and whether, follows from the values of the input."""

    def repeat(self: Any, h: Tensor, x: Tensor) -> Tensor:
        for _ in range(1 + int((x[:, 0] > 0).any())):
            h = torch.tanh(self.inner(h))
        return h * 2 if bool((x < 1e6).all()) else torch.zeros_like(h)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(repeat(self, self.hidden(x), x))

    return Model(forward, hidden=nn.Linear(5, 8), inner=nn.Linear(8, 8), head=nn.Linear(8, 3))


@entry(normal(6, 5))
def rounded_weights() -> nn.Module:
    """Half of a rounded weight is not the rounding of half the weight."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.detach().abs().max() / 7
            rounded = (self.weight / scale).round() * scale
            return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    return nn.Sequential(Rounded(5, 8), nn.ReLU(), Rounded(8, 3))


@entry(normal(6, 5), Width("left.weight[0] left.bias[0] right.weight[0] right.bias[0]", 8, obstacle=None))
def distance_of_two_towers() -> nn.Module:
    """Units of two branches meet each other, and no weight consumes them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return (torch.relu(self.left(x)) - torch.relu(self.right(x))).square().sum(-1)

    return Model(forward, left=nn.Linear(5, 8), right=nn.Linear(5, 8))


@entry(normal(6, 5))
def selected_rows() -> nn.Module:
    """How many rows come out depends on values."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        return self.head(h.index_select(0, (x[:, 0] > -9).nonzero().flatten()))

    return Model(forward, hidden=nn.Linear(5, 8), head=nn.Linear(8, 3))


@entry(normal(6, 5), Width("both.weight[0] both.bias[0] decay[0]", 4, obstacle=True))
def state_space() -> nn.Module:
    """What writes to a state and what reads from it come from one projection: no half of it alone is the fan-out."""

    def forward(self: Any, x: Tensor) -> Tensor:
        write, read = self.both(x).chunk(2, -1)
        return self.head((write * torch.exp(-self.decay.exp()) * read).sum(-1, keepdim=True))

    return Model(forward, both=nn.Linear(5, 8), decay=weight(4), head=nn.Linear(1, 3))
