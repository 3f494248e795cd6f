"""Convolutional models of the zoo."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_entry import Model, Width, entry, norm_axes, normal, pooled


@entry(
    normal(3, 3, 6, 6),
    Width(f"0.weight[0] 0.bias[0] {norm_axes('1')} 4.weight[1]", 6),
    Width(f"4.weight[0] {norm_axes('5')} 9.weight[1]", 8),
    pinned="0.weight[1] 9.weight[0] 9.bias[0]",
)
def cnn_batch_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


NEXT = "2.conv1.weight[1] 2.shortcut.0.weight[1]"
SHORTCUT = f"2.shortcut.0.weight[0] {norm_axes('2.shortcut.1')}"


class Residual(nn.Module):
    """A residual block with a projection shortcut where the shape changes."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


@entry(
    normal(3, 3, 6, 6),
    Width(f"0.weight[0] 0.bias[0] 1.conv1.weight[1] 1.conv2.weight[0] {norm_axes('1.norm2')} {NEXT}", 6),
    Width(f"1.conv1.weight[0] {norm_axes('1.norm1')} 1.conv2.weight[1]", 5),
    Width(f"2.conv1.weight[0] {norm_axes('2.norm1')} 2.conv2.weight[1]", 7),
    Width(f"2.conv2.weight[0] {norm_axes('2.norm2')} {SHORTCUT} 5.weight[1]", 8),
)
def residual_cnn() -> nn.Module:
    blocks = (nn.Conv2d(3, 6, 3, padding=1), Residual(6, 5, 6, 1), Residual(6, 7, 8, 2))
    return nn.Sequential(*pooled(*blocks), nn.Linear(8, 4))


@entry(
    normal(3, 3, 5, 5),
    Width(f"0.weight[0] {norm_axes('1')} 3.weight[0] 3.bias[0] {norm_axes('4')} 6.weight[1]", 6),
    Width("6.weight[0] 6.bias[0] 7.weight[0] 7.bias[0] 11.weight[1]", 8),
)
def depthwise_separable() -> nn.Module:
    """One depthwise convolution, and one with two outputs for each channel."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


@entry(
    normal(3, 3, 5, 5),
    Width("0.weight[0] 0.bias[0] 2.weight[1]", obstacle=None, symmetric=False),
    Width("2.weight[0] 2.bias[0] 6.weight[1]", obstacle=None, symmetric=False),
)
def grouped_conv() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU())
    return nn.Sequential(*pooled(*layers), nn.Linear(12, 3))


@entry(
    normal(3, 1, 4, 4),
    Width("first.weight[0] first.bias[0] second.weight[1]", 4),
    Width("second.weight[0] second.bias[0] major.weight[1] minor.weight[1]", 6),
)
def flatten_head() -> nn.Module:
    """A flatten with the entries of a channel side by side, and one with them far apart."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.major(x.flatten(1)) + self.minor(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1))

    convs = {"first": nn.Conv2d(1, 4, 3, padding=1), "second": nn.Conv2d(4, 6, 3)}
    return Model(forward, **convs, major=nn.Linear(24, 3), minor=nn.Linear(24, 3))


@entry(
    normal(3, 3, 5, 5),
    Width("0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 3.weight[1]", obstacle=True, symmetric=False),
    Width("3.weight[0] 3.bias[0] 4.weight[0] 4.bias[0] 6.weight[1]", 6, obstacle=True),
    Width("6.weight[0] 6.bias[0] 7.weight[0] 7.bias[0] 10.weight[1]", 4),
)
def group_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6), nn.SiLU()),
        *(nn.Conv2d(6, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(100, 3)),
    )


@entry(
    normal(6, 5),
    Width("0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0] 3.weight[1]", 8, obstacle=True),
    Width("3.weight[0] 3.bias[0] 4.weight[0] 6.weight[1]", 6, obstacle=True),
)
def layer_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3))
    )


@entry(
    normal(3, 3, 5, 5),
    Width("stem.weight[0] stem.bias[0] squeeze.weight[1] excite.weight[0] excite.bias[0] head.weight[1]", 8),
    Width("squeeze.weight[0] squeeze.bias[0] excite.weight[1]", 3),
)
def squeeze_excite() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))

    parts = {"squeeze": nn.Conv2d(8, 3, 1), "excite": nn.Conv2d(3, 8, 1)}
    return Model(forward, stem=nn.Conv2d(3, 8, 3), **parts, head=nn.Linear(8, 3))


@entry(
    normal(2, 1, 4, 4),
    Width("down.weight[0] down.bias[0] inner.weight[1] out.weight[1]", 4),
    Width("inner.weight[0] inner.bias[0] up.weight[0]", 6),
    Width("up.weight[1] up.bias[0] out.weight[1]", 5),
    pinned="down.weight[1] out.weight[0] out.bias[0]",
)
def unet() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        skip = torch.relu(self.down(x))
        inner = torch.relu(self.inner(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, torch.relu(self.up(inner))], dim=1))

    convs = {"down": nn.Conv2d(1, 4, 3, padding=1), "inner": nn.Conv2d(4, 6, 3, padding=1)}
    return Model(forward, **convs, up=nn.ConvTranspose2d(6, 5, 2, stride=2), out=nn.Conv2d(9, 2, 1))


@entry(
    normal(2, 3, 5),
    Width("0.weight[0] 0.bias[0] 2.weight[0]", 6),
    Width(f"2.weight[1] 2.bias[0] {norm_axes('3')} 5.weight[1]", 4),
    pinned="0.weight[1] 5.weight[0] 5.bias[0]",
)
def conv1d_and_transposed() -> nn.Module:
    layers = (nn.Conv1d(3, 6, 3), nn.Tanh(), nn.ConvTranspose1d(6, 4, 3, stride=2), nn.BatchNorm1d(4), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv1d(4, 2, 1))


@entry(
    normal(2, 1, 4, 4, 4),
    Width("0.weight[0] 0.bias[0] 1.weight[0] 2.weight[1]", 6),
    Width(f"2.weight[0] 2.bias[0] {norm_axes('3')} 6.weight[1]", 4),
)
def conv3d_prelu() -> nn.Module:
    """The PReLU has one slope for each channel."""
    convs = (nn.Conv3d(1, 6, 2), nn.PReLU(6), nn.Conv3d(6, 4, 2), nn.BatchNorm3d(4))
    return nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


@entry(
    normal(2, 3, 4, 4),
    Width("stem.weight[0] stem.bias[0] mix.weight[1]", obstacle=None),
    Width("mix.weight[0] mix.bias[0] head.weight[1]", 5),
)
def channel_shuffle() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(torch.relu(self.mix(x)).mean((2, 3)))

    return Model(forward, stem=nn.Conv2d(3, 8, 1), mix=nn.Conv2d(8, 5, 1), head=nn.Linear(5, 3))


@entry(
    normal(2, 3, 4, 4),
    Width("stem.weight[0] stem.bias[0] deep.weight[1] out.weight[1]", 6),
    Width("deep.weight[0] deep.bias[0] out.weight[1]", 5),
)
def feature_pyramid() -> nn.Module:
    """Padding and interpolation, whose kernels ask for plain sizes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(F.pad(x, (0, 1, 0, 1))))
        deep = torch.tanh(self.deep(F.avg_pool2d(stem, 2)))
        return self.out(torch.cat([F.interpolate(deep, scale_factor=2, mode="bilinear"), stem], dim=1)).mean((2, 3))

    return Model(forward, stem=nn.Conv2d(3, 6, 2), deep=nn.Conv2d(6, 5, 1), out=nn.Conv2d(11, 3, 1))


@entry(
    normal(3, 3, 5, 5),
    Width("0.weight[0] 0.bias[0] 3.weight[1]", obstacle=True, symmetric=False),
    Width("3.weight[0] 3.bias[0] 4.running_mean[0] 4.running_var[0] 8.weight[1]", 5),
    Width("8.weight[0] 8.bias[0] 10.weight[1]", 7, obstacle=True),
)
def norms_without_weights() -> nn.Module:
    """The only trace of the width is a Python integer, or nothing at all."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8, affine=False), nn.ReLU()),
        *(nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU(), nn.Identity()),
        *(nn.Flatten(), nn.Linear(5, 7), nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 3)),
    )
