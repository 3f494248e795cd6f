"""Methods that make networks larger: one file each."""

from lightning_grow.growth.net2net import Net2Net, net2deeper, net2wider, with_noise

__all__ = ["Net2Net", "net2deeper", "net2wider", "with_noise"]
