"""Ordinary LightningModules that know nothing of growing, and ordinary Trainers, for the tests of the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Perceptron(pl.LightningModule):
    """Two hidden layers with batch norm; no example input, so tracing goes through ``training_step``."""

    def __init__(self, hidden: int = 6, lr: float = 1e-2, example: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.fc1 = nn.Linear(4, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, 5)
        self.head = nn.Linear(5, 2)
        self.lr = lr
        self.steps_run = 0
        if example:
            self.example_input_array = torch.zeros(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(F.relu(self.norm(self.fc1(x))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps_run += 1
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Block(nn.Module):
    """A residual block that is the identity when its second layer is zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Residual(Perceptron):
    """A stack of residual blocks, which can be made deeper."""

    def __init__(self, hidden: int = 4, lr: float = 1e-2, depth: int = 2) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*(Block(6, hidden) for _ in range(depth)))
        self.head = nn.Linear(6, 2)
        self.lr = lr
        self.steps_run = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Convolutional(Perceptron):
    """Two convolutions over the four numbers of a sample, the second of them depthwise, and a flat head."""

    def __init__(self, hidden: int = 4, lr: float = 1e-2) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.conv1 = nn.Conv1d(1, hidden, 3, padding=1)
        self.conv2 = nn.Conv1d(hidden, hidden, 1, padding="same", groups=hidden)
        self.head = nn.Linear(4 * hidden, 2)
        self.lr = lr
        self.steps_run = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.conv1(x[:, None]))).flatten(1))


class Smooth(Residual):
    """The same with an activation that is smooth, and zero at zero."""

    def __init__(self, hidden: int = 4, lr: float = 1e-2) -> None:
        super().__init__(hidden, lr, depth=1)
        self.blocks = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 6), nn.Tanh())


def loader(
    batch_size: int = 8, samples: int = 48, dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1
) -> DataLoader[Any]:
    """Return a small fixed classification task, in fixed order: the same global batches for any number of ranks."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64).to(dtype)
    data = TensorDataset(x, (x.sum(dim=1) > 0).long())
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size // ranks, sampler=sampler)


def trainer(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """Return a quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(defaults | arguments))


def build(cls: type[pl.LightningModule], **arguments: Any) -> Any:
    """Return a model with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return cls(**arguments)


def state_of(module: pl.LightningModule, run: pl.Trainer) -> dict[str, Tensor]:
    """Return all weights, buffers and optimizer states of a run by name."""
    state = {f"model.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for index, optimizer in enumerate(run.optimizers):
        for parameter, memory in optimizer.state.items():
            for key, value in memory.items():
                state[f"optimizer{index}.{names[id(parameter)]}.{key}"] = torch.as_tensor(value).clone()
    return state
