"""The table and the picture of `growth.md`: ``python docs/methods/evidence_growth.py --data data/fashion_mnist``.

Every method of growing in width takes the same small network to the same number of parameters in the same number of
optimizer steps, at the same steps of a run, on a part of Fashion-MNIST. Beside them: the large network from scratch,
for as many steps and for fewer, and GroMo's growing perceptron. Every run is one row of a CSV file, and is not repeated
while its row is there: the command can be stopped, and given parts (``--methods``, ``--seeds``, ``--task``,
``--limit``).
"""

# ruff: noqa: T201, ARG002, PLC0415 (a command that says what it does; hooks; imports of what is optional)

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rows import append, read, write_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_grow import growth
from lightning_grow.data import FashionMNIST
from lightning_grow.growth.tiny import AMPLITUDES
from lightning_grow.trainer import StructuralCallback

HERE = Path(__file__).parent
BATCH, IMAGES, VALIDATION = 64, 6000, 1 / 6
EVENTS = 5
"""Events of each method, evenly spaced in the first half of the run; each wants half as many units more."""


def perceptron(width: int = 8) -> nn.Module:
    """Return a perceptron with two hidden layers."""
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def cnn(width: int = 4) -> nn.Module:
    """Return three convolutions with batch norm, of one, two and two widths, a mean over the image and a head."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@dataclass(frozen=True)
class Task:
    """A network, small and four times as wide, and how long it is trained."""

    build: Callable[[int], nn.Module]
    small: int
    large: int
    epochs: int
    lr: float  # of 1e-3, 3e-3, 1e-2 and 3e-2 the best for the large network on the validation images, or as good


TASKS = {"mlp": Task(perceptron, 8, 32, 10, 3e-3), "cnn": Task(cnn, 4, 16, 5, 1e-2)}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RandomGrowth": ("RandomGrowth", {}),
    "RandomGrowth (splits)": ("RandomGrowth", {"kind": "split"}),
    "Net2Net": ("Net2Net", {}),
    "SplittingSteepestDescent": ("SplittingSteepestDescent", {}),
    "SignedSplitting": ("SignedSplitting", {}),
    "Firefly": ("Firefly", {}),
    "GradMax": ("GradMax", {}),
    "Tiny": ("Tiny", {}),
    "GaussNewton": ("GaussNewton", {}),
    "NoisyHeuristics": ("NoisyHeuristics", {"fraction": 1.0, "num_decay_steps": 10}),
}
"""What a row is called, and the callback with the arguments that are not those of all.

Noisy Heuristics removes half as many units as it adds, so twice as many are added; they fade before the next event.
"""

SCRATCH = {f"from scratch, {share:.0%} of the steps": share for share in (1.0, 0.7, 0.5, 0.3)}
GROMO = "GroMo GrowingMLP"


@dataclass
class Row:
    """One run. FLOPs are those of all training steps, forward and backward, and of what a method measured."""

    task: str
    method: str
    seed: int
    test_accuracy: float
    val_accuracy: float
    parameters: int
    steps: int
    training_gflops: float
    event_gflops: float
    seconds: float
    events: int

    @property
    def gflops(self) -> float:
        """All floating-point operations, in 10^9."""
        return self.training_gflops + self.event_gflops


class Classifier(pl.LightningModule):
    """An ordinary classifier: AdamW, a cosine down to zero."""

    def __init__(self, network: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.network, self.lr, self.steps = network, lr, steps
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Meter(pl.Callback):
    """Counts the floating-point operations of the training steps: once for each size that the network has."""

    def __init__(self) -> None:
        self.total, self._known, self._size = 0, 0, -1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        size = sum(p.numel() for p in module.parameters())
        if size != self._size:
            self._known, self._size = step_flops(module.network, batch), size
        self.total += self._known


def step_flops(network: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Return the operations of one training step."""
    probe = copy.deepcopy(network)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(probe(batch[0]), batch[1]).backward()
    return int(counter.get_total_flops())


def counted(cls: type[StructuralCallback]) -> type[StructuralCallback]:
    """Return a callback that counts what its method measures at events."""

    class Counted(cls):  # type: ignore[valid-type, misc]
        flops = 0

        def propose(self, occasion: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                found = super().propose(occasion)
            self.flops += int(counter.get_total_flops())
            return found

    return Counted


def parameters_of(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in network.parameters())


def accuracy(network: nn.Module, loader: Any) -> float:
    """Return the share of images that are classified rightly."""
    network.eval()
    with torch.no_grad():
        hits = [(network(x).argmax(1) == y).float() for x, y in loader]
    return float(torch.cat(hits).mean())


def data_of(folder: Path, seed: int) -> FashionMNIST:
    """Return 5,000 training images, 1,000 for validation, and the whole test set; the split has a fixed seed."""
    data = FashionMNIST(str(folder), batch_size=BATCH, num_train=IMAGES, val_fraction=VALIDATION, seed=0)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(seed)
    return data


def fit(task: Task, network: nn.Module, data: FashionMNIST, steps: int, *callbacks: pl.Callback) -> Meter:
    """Train for so many steps."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[*callbacks, meter],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(Classifier(network, task.lr, steps), data.train_dataloader())
    return meter


def grown(name: str, task: Task, data: FashionMNIST, seed: int, steps: int) -> tuple[nn.Module, float, float, int]:
    """Grow the small network by a method; return it, with the operations of training and of events."""
    cls_name, arguments = METHODS[name]
    network = task.build(task.small)
    at = [round(steps / 2 * (i + 1) / EVENTS) for i in range(EVENTS)]
    limit = parameters_of(task.build(task.large))
    common = {"at_steps": at, "fraction": 0.5, "max_parameters": limit, "seed": seed, "verbose": False} | arguments
    callback = counted(getattr(growth, cls_name))(**common)
    meter = fit(task, network, data, steps, callback)
    events = {event.step for event in callback.record.events}
    return network, meter.total, callback.flops, len(events)  # type: ignore[attr-defined]


def gromo(task: Task, data: FashionMNIST, steps: int) -> tuple[nn.Module, float, float, int]:
    """Grow the perceptron of GroMo in a loop of its own: statistics of 8 batches, amplitudes as in `Tiny`."""
    try:
        from gromo.containers.growing_mlp import GrowingMLP
    except ImportError as error:
        raise SystemExit(
            f"GroMo is needed for '{GROMO}' ({error}): pip install 'lightning-grow[evidence]', or "
            "leave it out by --methods."
        ) from error
    network = GrowingMLP((1, 28, 28), 10, task.small, 2, activation=nn.ReLU(), device=torch.device("cpu"))
    limit = parameters_of(task.build(task.large))
    at = [round(steps / 2 * (i + 1) / EVENTS) for i in range(EVENTS)]
    batches, seen, total, spent, events = iter(()), [], 0.0, 0.0, 0  # type: ignore[var-annotated]

    def optimizer_of(lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)

    def rate(step: int) -> float:
        return task.lr * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps)))) / 2

    optimizer, size, known = optimizer_of(task.lr), -1, 0
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:
            batches = iter(data.train_dataloader())
            batch = next(batches)
        if parameters_of(network) != size:
            known, size = step_flops(network, batch), parameters_of(network)
        network.train()
        optimizer.param_groups[0]["lr"] = rate(step - 1)
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
        total += known
        seen = [*seen[-7:], batch]
        if step in at and parameters_of(network) < limit:
            with FlopCounterMode(display=False) as counter:
                events += _gromo_event(network, seen, limit)
            spent += counter.get_total_flops()
            optimizer = optimizer_of(rate(step))
    return network, total, spent, events


def _gromo_event(network: Any, batches: Sequence[tuple[Tensor, Tensor]], limit: int) -> int:
    """Let each hidden layer grow by half, within the limit; return whether any did."""
    grew = 0
    for index, layer in enumerate(network._growable_layers):
        width = layer.in_features
        cost = network.layers[index].in_features + 1 + layer.out_features
        room = (limit - parameters_of(network)) // cost
        wanted = min(-(-width // 2), room)
        if wanted < 1:
            continue
        network.set_growing_layers(index=index)
        network.init_computation()
        network.eval()
        for x, y in batches:
            network.zero_grad()
            F.cross_entropy(network(x), y, reduction="sum").backward()  # as GroMo's own statistics are computed
            network.update_computation()
        network.compute_optimal_updates(maximum_added_neurons=wanted)
        network.reset_computation()
        network.select_update(layer_index=0)
        losses = {}
        for scale in (0.0, *(amplitude**0.5 for amplitude in AMPLITUDES)):  # both sides of a unit are multiplied by it
            network.currently_updated_layer.scaling_factor = scale
            with torch.no_grad():
                loss = sum(F.cross_entropy(network.extended_forward(x), y) for x, y in batches)
            losses[float(loss)] = scale
        network.currently_updated_layer.scaling_factor = losses[min(losses)] or 0.1
        network.apply_change()
        grew = 1
    network.zero_grad()
    return grew


def run(task_name: str, method: str, seed: int, folder: Path) -> Row:
    """Do one run."""
    task, begin = TASKS[task_name], time.perf_counter()
    data = data_of(folder, seed)
    steps = task.epochs * len(data.train_dataloader())
    if method in SCRATCH:
        steps = round(SCRATCH[method] * steps)
        network = task.build(task.large)
        result = network, float(fit(task, network, data, steps).total), 0.0, 0
    elif method == GROMO:
        result = gromo(task, data, steps)
    else:
        result = grown(method, task, data, seed, steps)
    network, training, events, count = result
    seconds = time.perf_counter() - begin
    tested, validated = accuracy(network, data.test_dataloader()), accuracy(network, data.val_dataloader())
    size = parameters_of(network)
    return Row(
        task_name, method, seed, tested, validated, size, steps, training / 1e9, events / 1e9, round(seconds, 1), count
    )


def table(rows: Sequence[Row]) -> str:
    """Return a table: mean and standard deviation over seeds."""
    lines = [
        "| | test accuracy | from scratch, as many FLOPs | size | training GFLOPs | at events | seconds | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_method = {m: [r for r in rows if r.method == m] for m in dict.fromkeys(r.method for r in rows)}
    curve = scratch_curve(rows)
    for method, runs in sorted(by_method.items(), key=lambda item: -statistics.mean(r.test_accuracy for r in item[1])):
        scores = [100 * r.test_accuracy for r in runs]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        mean = {
            n: statistics.mean(getattr(r, n) for r in runs)
            for n in ("parameters", "training_gflops", "event_gflops", "seconds")
        }
        same = "" if method in SCRATCH else _percent(at(curve, mean["training_gflops"] + mean["event_gflops"]))
        lines.append(
            f"| {method} | {statistics.mean(scores):.1f}{spread} % | {same} | {mean['parameters']:,.0f} "
            f"| {mean['training_gflops']:,.1f} | {mean['event_gflops']:,.1f} | {mean['seconds']:.0f} | {len(runs)} |"
        )
    return "\n".join(lines)


def scratch_curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return operations and mean accuracy of the large network from scratch, for each length of training."""
    found = []
    for method in SCRATCH:
        runs = [r for r in rows if r.method == method]
        if runs:
            found.append((statistics.mean(r.gflops for r in runs), statistics.mean(r.test_accuracy for r in runs)))
    return sorted(found)


def at(curve: Sequence[tuple[float, float]], gflops: float) -> float | None:
    """Return the accuracy from scratch for so many operations, on straight lines between runs; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= gflops <= x1:
            return y0 + (y1 - y0) * (gflops - x0) / (x1 - x0)
    return None


def _percent(value: float | None) -> str:
    return "outside" if value is None else f"{100 * value:.1f} %"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw test accuracy over operations, a panel for each task."""
    from matplotlib.figure import Figure

    tasks = [name for name in TASKS if any(r.task == name for r in rows)]
    figure = Figure(figsize=(6.5 * len(tasks), 5), layout="constrained")
    for place, name in enumerate(tasks, start=1):
        axes, mine = figure.add_subplot(1, len(tasks), place), [r for r in rows if r.task == name]
        curve = scratch_curve(mine)
        axes.plot([x for x, _ in curve], [100 * y for _, y in curve], "k.-", label="the large network from scratch")
        methods = dict.fromkeys(r.method for r in mine if r.method not in SCRATCH)
        for method, marker in zip(methods, itertools.cycle("os^vDP*X<>p"), strict=False):
            runs = [r for r in mine if r.method == method]
            scores = [100 * r.test_accuracy for r in runs]
            axes.errorbar(
                statistics.mean(r.gflops for r in runs),
                statistics.mean(scores),
                statistics.stdev(scores) if len(scores) > 1 else 0.0,
                fmt=marker,
                capsize=3,
                label=method,
            )
        axes.set(title=name.upper(), xlabel="GFLOPs of training and events", ylabel="test accuracy (%)", xscale="log")
        axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def page(rows: Sequence[Row], path: Path) -> None:
    """Write the page between its two marks; what stands around them is kept."""
    parts = []
    for name, task in TASKS.items():
        mine = [r for r in rows if r.task == name]
        if mine:
            small, large = parameters_of(task.build(task.small)), parameters_of(task.build(task.large))
            title = f"### {name.upper()}: {small:,} to {large:,} parameters, {max(r.steps for r in mine)} steps"
            seeds = min(sum(r.method == m for r in mine) for m in {r.method for r in mine})
            few = "Too few seeds yet to read an order from it; methods that are not listed have not been run.\n\n"
            parts.append(title + "\n\n" + (few if seeds < 5 else "") + table(mine))
    write_table(path, "\n\n".join(parts))


def wanted(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yield the runs that are asked for, seed by seed; a line says which methods are not there."""
    absent = [name for name in methods if name in METHODS and not hasattr(growth, METHODS[name][0])]
    for name in absent:
        print(f"skipped: lightning_grow.growth has no {METHODS[name][0]}")
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                if method not in absent and not (method == GROMO and task != "mlp"):
                    yield task, method, seed


def main() -> None:
    """Do the runs that are missing, and write the page."""
    everything = [*METHODS, *SCRATCH, GROMO]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=None, help="stop after so many runs")
    parser.add_argument("--minutes", type=float, default=None, help="begin no run after so many minutes")
    parser.add_argument("--csv", type=Path, default=HERE / "growth.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    begin, done = time.perf_counter(), {(r.task, r.method, r.seed) for r in read(arguments.csv, Row)}
    left = arguments.limit
    for key in wanted(arguments.task, arguments.methods, arguments.seeds):
        late = arguments.minutes is not None and time.perf_counter() - begin > 60 * arguments.minutes
        if key in done or left == 0 or late:
            continue
        row = run(*key, arguments.data)
        append(arguments.csv, row)
        left = None if left is None else left - 1
        print(
            f"{row.task} {row.method} seed {row.seed}: {100 * row.test_accuracy:.1f} %, {row.parameters:,} parameters, "
            f"{row.gflops:,.1f} GFLOPs, {row.events} events, {row.seconds:.0f} s",
            flush=True,
        )
    rows = read(arguments.csv, Row)
    picture(rows, HERE.parent / "images" / "growth.png")
    page(rows, HERE / "growth.md")


if __name__ == "__main__":
    main()
