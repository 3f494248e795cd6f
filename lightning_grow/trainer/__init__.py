"""The only folder that touches a Trainer."""

from lightning_grow.trainer.budget import Budget
from lightning_grow.trainer.editing import editing
from lightning_grow.trainer.history import History
from lightning_grow.trainer.learning_rates import LearningRateAdaptation
from lightning_grow.trainer.loss_feed import LossFeed
from lightning_grow.trainer.occasion import Occasion
from lightning_grow.trainer.proposal import BlockEdit, Change, Proposal
from lightning_grow.trainer.record import Event, Record
from lightning_grow.trainer.resume import load_from_checkpoint
from lightning_grow.trainer.structural_callback import StructuralCallback
from lightning_grow.trainer.triggers import Trigger

__all__ = [
    "BlockEdit",
    "Budget",
    "Change",
    "Event",
    "History",
    "LearningRateAdaptation",
    "LossFeed",
    "Occasion",
    "Proposal",
    "Record",
    "StructuralCallback",
    "Trigger",
    "editing",
    "load_from_checkpoint",
]
