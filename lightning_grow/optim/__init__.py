"""Optimizers that adapt their learning rate, in the grammar of ``torch.optim``."""
