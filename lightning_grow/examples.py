"""The ordinary models of the recipes. Nothing in this file knows that a network can grow."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, added to what came in.

    Args:
        channels: Channels in and out.
        hidden: Channels between the two convolutions.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, channels, height, width)``, as it came."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResidualCNN(nn.Module):
    """A stem, stages of residual blocks with halved resolution between them, a mean over the image, a linear head.

    Args:
        in_channels: Channels of the images.
        num_classes: Outputs.
        widths: Channels of each stage.
        depth: Residual blocks in each stage.

    Example:
        >>> ResidualCNN(in_channels=1, num_classes=10, widths=[4, 8], depth=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int, widths: list[int], depth: int) -> None:
        super().__init__()
        before = [in_channels, *widths]
        self.entries = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before[i], width, 3, stride=1 if i == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for i, width in enumerate(widths)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, width) for _ in range(depth))) for width in widths
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        for entry, stage in zip(self.entries, self.stages, strict=True):
            x = stage(entry(x))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ImageClassifier(pl.LightningModule):
    """A residual CNN with AdamW, a short warm-up and a cosine down to zero.

    Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``.

    Args:
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        num_classes: Classes.
        widths: Channels of each stage; default ``[4, 8]``.
        depth: Residual blocks in each stage.
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        warmup_fraction: Share of all steps in which the learning rate rises.

    Example:
        >>> model = ImageClassifier(image_size=8)
        >>> model(model.example_input_array).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        widths: list[int] | None = None,
        depth: int = 1,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        warmup_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = ResidualCNN(in_channels, num_classes, widths or [4, 8], depth)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")
        self.example_input_array = torch.zeros(2, in_channels, image_size, image_size)
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        del batch_idx
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on held-out images."""
        del batch_idx
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on test images."""
        del batch_idx
        x, y = batch
        logits = self(x)
        self.test_acc(logits, y)
        self.log("test_loss", F.cross_entropy(logits, y), sync_dist=True)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and its schedule, one update per step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = max(1, round(self.warmup_fraction * total))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup + 1))))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
