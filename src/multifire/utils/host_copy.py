"""Copy tensors from a GPU to the host while the host goes on."""

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors on the host. The copying starts at once, behind the work that the device has been given so far.

    Tensors that lie on the host are not copied.
    """

    def __init__(self, *tensors: Tensor):
        self._copies = [_start(tensor) for tensor in tensors]
        self._done = None
        if tensors[0].is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """Return the copies as soon as they are complete. Work that the device was given later is not waited for."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies


def _start(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
