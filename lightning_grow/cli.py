"""The ``lightning-grow`` command: a LightningCLI for any module and data, and a look at structures and runs.

``fit``, ``validate``, ``test`` and ``predict`` are Lightning's own, with its options, configuration files and errors;
after ``fit`` stands a report. ``inspect``, ``plan`` and ``plot`` are described by their ``--help``.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich import get_console
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from typing_extensions import override

import lightning_grow as lg
from lightning_grow.data import DataFileError
from lightning_grow.inspection import TargetError, build, describe, example_inputs, parse_arguments, resolve
from lightning_grow.planning import Plan, PlanError
from lightning_grow.report import PICTURE_FILE, RunError, events_table, picture, read_history
from lightning_grow.structure import StructureError
from lightning_grow.trainer.history import HISTORY_FILE, History, run_folder, write_history
from lightning_grow.trainer.probe import trace_module
from lightning_grow.trainer.run import run_of
from lightning_grow.trainer.structural_callback import StructuralCallback

_COMMANDS = """\
usage: lightning-grow COMMAND ...

Networks that change their own architecture while they train.

commands:
  fit        train; --config recipes/digits.yaml is a good start
  validate   measure on validation data
  test       measure on test data
  predict    run on new data
  inspect    print what may vary in any importable model, and what not and why
  plan       write an editable plan of what may change in the model of a recipe
  plot       draw the architecture of a run over time

'lightning-grow COMMAND --help' describes each. Version {version}.
"""


@dataclass
class ReportOptions:
    """What ``fit`` does once training has ended, after the table of events.

    Attributes:
        test: Test the network, on the data module's test images.
        ungrown: Train the same seed without growing for as long, and show it beside.
        picture: Draw the architecture over time into the folder of the run.
    """

    test: bool = False
    ungrown: bool = False
    picture: bool = True


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in the folder of the run, whichever logger it has."""

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if folder is not None and stage == "fit":
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)


class GrowCLI(LightningCLI):
    """A LightningCLI whose ``fit`` keeps the history of the architecture and reports on it."""

    def __init__(self, args: Sequence[str]) -> None:
        self.history = History()
        super().__init__(
            args=list(args),
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [self.history],
                "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
            },
            parser_kwargs={"version": lg.__version__},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the report, and the number of threads."""
        _add_arguments(parser)

    def before_instantiate_classes(self) -> None:
        """Set the number of threads."""
        num_threads = self.config[self.subcommand].num_threads
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def after_fit(self) -> None:
        """Print the events, where the picture is, what to try next, and test metrics beside the ungrown seed's."""
        if self.config[self.subcommand].trainer.fast_dev_run:
            return
        options = self.config_init[self.subcommand].report
        console = _console()
        folder = run_folder(self.trainer)
        history = self.history.to_dict(self.model)
        grown = _Result.of(self, options.test)
        ungrown = None
        if options.ungrown:
            if self.trainer.is_global_zero:
                console.print("For comparison: the same seed, trained as long without growing.")
            with _quiet("lightning.pytorch", "lightning.fabric"):
                twin = UngrownCLI(self.config[self.subcommand], folder)
                twin.trainer.fit(twin.model, datamodule=twin.datamodule)
                ungrown = _Result.of(twin, options.test)
            curve = twin.history.train
            history["curves"].insert(
                0, {"name": "ungrown", "steps": curve.steps, "values": curve.values, "held_out": False, "faint": True}
            )
        if not self.trainer.is_global_zero:
            return
        record = run_of(self.model).record
        console.print(events_table(record) if record.events else "Nothing changed: no event took place.")
        if folder is not None and history["snapshots"]:
            write_history(folder, history)
            if options.picture:
                path = _draw(history, folder / PICTURE_FILE, folder.parent.name)
                console.print(f"Architecture over time: {path}\n")
                for logger in self.trainer.loggers:
                    if isinstance(logger, WandbLogger):
                        logger.log_image("architecture", [str(path)])
        _print_next_steps(console, self, folder)
        _print_results(console, grown, ungrown)


class UngrownCLI(LightningCLI):
    """The same seed, model, data and training as a run, but without its structural callbacks. Nothing is run yet."""

    def __init__(self, config: Namespace, folder: Path | None) -> None:
        self.history = History()
        self.folder = folder
        config = config.clone()
        arguments_of_fit = set(inspect.signature(pl.Trainer.fit).parameters) - self.subcommands()["fit"]
        for name in ("config", *arguments_of_fit):
            config.pop(name, None)
        config.trainer.logger = False
        super().__init__(args=config, run=False, save_config_callback=None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the same configuration."""
        _add_arguments(parser)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return a trainer that logs beside the run, and keeps no checkpoints."""
        given = self.config_init.trainer.callbacks or []
        callbacks = given if isinstance(given, list) else [given]
        return super().instantiate_trainer(
            callbacks=[*(c for c in callbacks if not isinstance(c, (StructuralCallback, Checkpoint))), self.history],
            logger=False if self.folder is None else CSVLogger(self.folder, name="ungrown", version=""),
            enable_checkpointing=False,
            enable_model_summary=False,
            **kwargs,
        )


class PlanCLI(LightningCLI):
    """Sets up the training of a recipe up to its first batch, and makes the plan that its callbacks would have."""

    def __init__(self, args: Sequence[str]) -> None:
        self.look = _FirstBatch()
        alone = ["--trainer.callbacks=null", "--trainer.logger=false", "--trainer.strategy=auto", "--trainer.devices=1"]
        super().__init__(args=["fit", *args, *alone], save_config_callback=None, seed_everything_default=0)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the configuration of ``fit``."""
        _add_arguments(parser)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return a trainer that does not train, and leaves nothing behind."""
        quiet = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
        return super().instantiate_trainer(
            callbacks=[self.look], limit_train_batches=1, limit_val_batches=0, max_epochs=1, **quiet, **kwargs
        )


class _FirstBatch(pl.Callback):
    """Makes a plan as soon as there is a batch, and lets nobody train on it."""

    plan: Plan

    @override
    def on_train_batch_start(  # type: ignore[override]  # Lightning ends the epoch at -1
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> int:
        self.plan = Plan.of(trace_module(trainer, pl_module, batch, batch_idx), pl_module)
        return -1


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(ReportOptions, "report")
    parser.add_argument(
        "--num_threads",
        type=PositiveInt | None,
        default=None,
        help="Threads for computations on the CPU; tiny networks run fastest with one.",
    )


@dataclass(frozen=True)
class _Result:
    """What a trained network is worth."""

    parameters: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, cli: LightningCLI, test: bool) -> _Result:
        metrics: dict[str, float] = {}
        if test:
            metrics |= cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
        return cls(sum(parameter.numel() for parameter in cli.model.parameters()), metrics)


def _print_results(console: Console, grown: _Result, ungrown: _Result | None) -> None:
    for name in sorted(grown.metrics, key=lambda name: ("acc" in name, name)):
        line = f"{name}  {grown.metrics[name]:.4f}  grown, {grown.parameters:,} parameters"
        if ungrown is not None:
            line += f"   |   {ungrown.metrics[name]:.4f}  the same seed ungrown, {ungrown.parameters:,} parameters"
        console.print(line)


def _print_next_steps(console: Console, cli: GrowCLI, folder: Path | None) -> None:
    model = type(cli.model)
    steps = [f"lightning-grow inspect {model.__module__}.{model.__qualname__}   # what may vary in this model"]
    if folder is not None:
        steps.append(f"lightning-grow plot {folder}   # draw the picture again")
        checkpoint = cli.trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_path", "")
        if best:
            steps.append(f"lightning-grow test --config {folder / 'config.yaml'} --ckpt_path {best}   # at that size")
    other = Path("recipes/fashion_mnist.yaml")
    if other.is_file():
        steps.append(f"lightning-grow fit --config {other}   # the same on more data")
    steps.append("a larger max_parameters in the recipe, or lightning_grow.MagnitudePruning after the growth")
    console.print("What to try next:")
    for step in steps:
        console.print(f"  {step}", soft_wrap=True)
    console.print()


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let only warnings of these loggers through."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _events_on_terminal() -> Iterator[None]:
    """Show the package's own log above the progress bar, unless the application has set it up."""
    logger = logging.getLogger("lightning_grow")
    if logger.handlers or logger.level != logging.NOTSET:
        yield
        return
    handler = RichHandler(
        console=get_console(), show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _draw(history: dict[str, Any], path: Path, title: str) -> Path:
    picture(history, title).savefig(path, dpi=150)
    return path


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, markup=False, highlight=False, width=None if stream.isatty() else 140)


def inspect_command(args: Sequence[str]) -> None:
    """Run ``lightning-grow inspect``."""
    parser = argparse.ArgumentParser(
        prog="lightning-grow inspect",
        description="Print which widths and depths of a model may vary, what they cost, and why the rest is pinned.",
        epilog="example: lightning-grow inspect lightning_grow.examples.ImageClassifier --args '{\"image_size\": 8}'",
    )
    parser.add_argument("target", help="package.module.Class, package.module:callable or path/to/file.py:callable")
    parser.add_argument("--args", help="""arguments as JSON: '{"width": 8}' or '[8, 2]'""")
    parser.add_argument("--input-shape", action="append", default=[], help="e.g. 1,3,32,32; once for each input")
    parser.add_argument(
        "--input-dtype", action="append", default=[], help="e.g. int64; once for each input, or for all"
    )
    parser.add_argument("--inputs", help="module:function that returns the inputs: a tensor, a tuple or a dict")
    parser.add_argument("--axes", action="store_true", help="list every axis with its layout")
    parser.add_argument(
        "--yaml", nargs="?", const="", metavar="FILE", help="write the plan instead, to FILE or the standard output"
    )
    options = parser.parse_args(args)
    positional, keywords = parse_arguments(options.args)
    with contextlib.nullcontext() if options.yaml is None else contextlib.redirect_stdout(sys.stderr):
        model = build(resolve(options.target), options.target, positional, keywords)
        inputs, named_inputs = example_inputs(model, options.input_shape, options.input_dtype, options.inputs)
        structure = lg.trace(model, *inputs, **named_inputs)
    if options.yaml is None:
        _console().print(describe(model, structure, every_axis=options.axes))
    else:
        _write_plan(Plan.of(structure, model), options.yaml)


def plan_command(args: Sequence[str]) -> None:
    """Run ``lightning-grow plan``."""
    parser = argparse.ArgumentParser(
        prog="lightning-grow plan",
        description="Write what may change in the model of a recipe, and how far: YAML to edit, which a callback takes "
        "as its scope (groups: FILE). The recipe is set up as 'fit' would do it, but nothing is trained.",
        epilog="All other options are those of 'fit'. example: lightning-grow plan --config recipes/digits.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("-o", "--output", default="", metavar="FILE", help="file to write; default: standard output")
    options, rest = parser.parse_known_args(args)
    with contextlib.redirect_stdout(sys.stderr), _quiet("lightning.pytorch", "lightning.fabric"):
        plan = PlanCLI(rest).look.plan
    _write_plan(plan, options.output)


def _write_plan(plan: Plan, file: str) -> None:
    if not file:
        sys.stdout.write(plan.to_yaml())
        return
    try:
        plan.save(file)
    except OSError as error:
        raise RunError(f"Cannot write '{file}': {error}") from error
    _console().print(file, soft_wrap=True)


def plot_command(args: Sequence[str]) -> None:
    """Run ``lightning-grow plot``."""
    parser = argparse.ArgumentParser(
        prog="lightning-grow plot",
        description="Draw units per group, blocks per stack and losses of a run against optimizer steps.",
    )
    parser.add_argument("run", help=f"folder of a run, or of several: the newest '{HISTORY_FILE}' in it is drawn")
    parser.add_argument("-o", "--output", help=f"picture to write (.png, .svg, .pdf); default: RUN/{PICTURE_FILE}")
    parser.add_argument("--title", help="stands above the picture; default: the name of the run's folder of runs")
    options = parser.parse_args(args)
    folder, history = read_history(options.run)
    path = Path(options.output) if options.output else folder / PICTURE_FILE
    title = folder.absolute().parent.name if options.title is None else options.title
    try:
        _draw(history, path, title)
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot write '{path}': {error}") from error
    _console().print(str(path), soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments; default: those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help"}:
        _console().print(_COMMANDS.format(version=lg.__version__))
        return 0
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # models of the current folder, as with `python script.py`
    try:
        with warnings.catch_warnings(), _events_on_terminal():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(jsonargparse|lightning)\.")
            warnings.filterwarnings("ignore", r"[\s\S]*skip_none parameter")  # skip_unset is not in older jsonargparse
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning with newer torch
            warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data of the recipes is in memory
            warnings.filterwarnings("ignore", ".*configure_optimizers` will be overridden.*")  # a recipe says so
            commands = {"inspect": inspect_command, "plan": plan_command, "plot": plot_command}
            if args[0] in commands:
                commands[args[0]](args[1:])
            else:
                GrowCLI(args)
    except (StructureError, DataFileError, PlanError, TargetError, RunError) as error:
        _console(stderr=True).print(f"lightning-grow: error: {error}", soft_wrap=True)
        return 1
    return 0
