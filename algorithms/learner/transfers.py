"""Copies between the host and a GPU, for which neither of them waits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host from which a copy with `non_blocking` begins at once.

    From memory that the system may move, such a copy may wait until the GPU has done all that was begun before.

    Args:
        tensor: On the host.
        device: Where it will go. If that is no GPU, the tensor stays as it is.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device without waiting."""
    return pinned(tensor, device).to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host, as it was when it was sent, while the device computes on.

    Args:
        sent: A tensor on the device. What the device does next may overwrite it.
    """

    def __init__(self, sent: Tensor) -> None:
        self._host = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=sent.is_cuda)
        self._host.copy_(sent, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if sent.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numpy(self) -> np.ndarray:
        """Wait until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
