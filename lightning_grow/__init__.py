"""PyTorch Lightning networks that change their own architecture while they train."""

__version__ = "0.1.0"
