"""What learning rates do that adapt themselves: logged, kept, and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lightning_grow.optim.tensors import wide_dtype
from lightning_grow.plot import RateCurve, plot_learning_rates
from lightning_grow.trainer.history import LossCurve, run_folder

PICTURE_FILE = "learning_rates.png"
"""Name of the picture in the folder of a run."""


@runtime_checkable
class HasRates(Protocol):
    """What `LearningRateAdaptation` asks of an optimizer."""

    def rates(self) -> Mapping[str, float | Tensor]:
        """Return rates by name: a number, a tensor with one, or a tensor of many, of which mean and range are shown.

        What stands before the first slash of a name is its level: ``"lr"`` for everything, ``"layer/fc1"``,
        ``"unit/fc1"``, ``"weight/unit"``. Names should stay the same from step to step.
        """
        ...


class LearningRateAdaptation(pl.Callback):
    """Logs, keeps and draws rates of optimizers that adapt them: of `lightning_grow.optim`, or any with ``rates()``.

    Numbers are logged as ``rate/NAME``, with the names that the optimizer gives (``rate/lr``, ``rate/layer/fc1``,
    ``rate/weight/global``); where a name stands for many (units, parameters) as ``rate/NAME/mean``, ``/min`` and
    ``/max``. With several optimizers each name ends in its optimizer, ``rate/lr/optimizer0``. A network that grows may
    get new names. The history is kept in checkpoints, so a resumed run continues it.

    Args:
        every_n_steps: How often rates are looked at, ``>= 1``. On a GPU each look waits for the device.
        dirpath: Folder where the picture is drawn when training ends, as ``learning_rates.png``; default: the folder of
            the run, by its logger. Without either, none is drawn.

    Attributes:
        history: For each logged name, the steps and the values.

    Raises:
        MisconfigurationException: If an argument is out of range, or no optimizer has rates to show.

    Example::

        rates = LearningRateAdaptation(every_n_steps=10)
        trainer = L.Trainer(callbacks=[rates])
        trainer.fit(module, datamodule=data)
        rates.plot("rates.png")
    """

    def __init__(self, every_n_steps: int = 10, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise MisconfigurationException(f"`every_n_steps` should be at least 1, found {every_n_steps!r}.")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.history: dict[str, LossCurve] = {}
        self._last_step = -1

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(isinstance(optimizer, HasRates) for optimizer in trainer.optimizers):
            found = ", ".join(sorted({type(optimizer).__name__ for optimizer in trainer.optimizers})) or "none"
            raise MisconfigurationException(
                "LearningRateAdaptation shows rates of optimizers that adapt them, by their method `rates()`, found "
                f"{found}. Lightning's LearningRateMonitor shows those of others."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        found: dict[str, float] = {}
        for number, optimizer in enumerate(trainer.optimizers):
            if isinstance(optimizer, HasRates):
                end = "" if len(trainer.optimizers) == 1 else f"/optimizer{number}"
                found |= _numbers({f"rate/{name}{end}": rate for name, rate in optimizer.rates().items()})
        for name, value in found.items():
            self.history.setdefault(name, LossCurve()).add(step, value)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step - 1)  # as Lightning counts: the first step is 0

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer) if self.dirpath is None else Path(self.dirpath)
        if folder is not None and self.history and trainer.is_global_zero:
            self.plot(folder / PICTURE_FILE)

    def plot(self, path: str | Path | None = None, title: str = "") -> Figure:
        """Draw the rates over the steps, a panel for each level.

        Args:
            path: Where to write the picture, if anywhere; its ending says how.
            title: Stands above it.

        Returns:
            The figure.

        Raises:
            ValueError: If nothing has been looked at yet.
        """
        figure = plot_learning_rates(_curves(self.history), title=title)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        return figure

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: asdict(curve) for name, curve in self.history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {name: LossCurve(**curve) for name, curve in state_dict["history"].items()}


def _numbers(rates: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return a number for each rate, and mean and range for many; all tensors of a device come in one transfer."""
    found: dict[str, float | Tensor] = {}
    for name, rate in rates.items():
        if isinstance(rate, Tensor) and rate.numel() > 1:
            found |= {f"{name}/mean": rate.mean(), f"{name}/min": rate.min(), f"{name}/max": rate.max()}
        elif isinstance(rate, Tensor) and rate.numel():
            found[name] = rate.reshape(())
        elif not isinstance(rate, Tensor):
            found[name] = rate
    tensors = {name: rate for name, rate in found.items() if isinstance(rate, Tensor)}
    for device in {rate.device for rate in tensors.values()}:
        here = [name for name, rate in tensors.items() if rate.device == device]
        found |= zip(here, torch.stack([tensors[name].to(wide_dtype(device)) for name in here]).tolist(), strict=True)
    return {name: float(rate) for name, rate in found.items()}


def _curves(history: Mapping[str, LossCurve]) -> dict[str, RateCurve]:
    """Return curves by name, mean and range of many as one."""
    curves = {}
    for key, curve in history.items():
        name, _, which = key.removeprefix("rate/").rpartition("/")
        if which == "mean" and f"rate/{name}/min" in history:
            low, high = history[f"rate/{name}/min"].values, history[f"rate/{name}/max"].values
            curves[name] = RateCurve(curve.steps, curve.values, low, high)
        elif not (which in ("min", "max") and f"rate/{name}/mean" in history):
            curves[key.removeprefix("rate/")] = RateCurve(curve.steps, curve.values)
    return {name: curve for name, curve in curves.items() if curve.steps}
