"""Where chunks are merged: the CPU or a GPU, and the copies between them.

Copies go through pinned memory, which torch keeps for the next ones. Every worker has a stream of its own, so that one
worker's copies overlap another's arithmetic and a third one's reading and writing.
"""

import os

import torch
from torch import Tensor

from .errors import MergeError
from .program import BLOCK

CPU = torch.device("cpu")
CHUNK_SIZE = 2 * BLOCK  # elements of one member: with its temporaries, what stays in a core's own cache
ON_GPU = 1 << 22  # what keeps a GPU busy while Python starts the next operation
SHARE = 0.8  # of a GPU's free memory that chunks and matrices may take unless told


def device_for(name: str) -> torch.device:
    """The device of that name, ready for threads; "cuda" is another GPU for each process that a launcher started.

    Raises MergeError for a device that is not there.
    """
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda"):
        raise MergeError(f"chunks are merged on 'cpu' or 'cuda' (a certain GPU: 'cuda:1'), not on {name!r}")
    if kind == "cpu":
        return CPU
    count = torch.cuda.device_count()
    if not count:
        raise MergeError("device 'cuda' was asked for, but torch finds no GPU here; use device 'cpu'")
    own = index or str(int(os.environ.get("LOCAL_RANK", 0)) % count)
    if not own.isdigit() or int(own) >= count:
        raise MergeError(f"there is no device {name!r}: torch finds {count} here, cuda:0 to cuda:{count - 1}")
    device = torch.device("cuda", int(own))
    torch.linalg.inv(torch.ones(1, 1, device=device))  # loads linear algebra, which threads must not do side by side
    return device


def chunk_size_on(device: torch.device) -> int:
    """Elements of one member that are merged at once unless told."""
    return CHUNK_SIZE if device.type == "cpu" else ON_GPU


def memory_limit(device: torch.device) -> int | None:
    """Bytes that a merge may use there unless told; None is no limit."""
    return None if device.type == "cpu" else int(SHARE * torch.cuda.mem_get_info(device)[0])


def place_in(place: Tensor, values: Tensor) -> None:
    """Copy values on the host to a place of another dtype; if that is on a GPU they travel as they are stored."""
    if place.is_cuda:
        values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        values = values.to(place.device, non_blocking=True)
    place.copy_(values)


def on_host(values: Tensor) -> Tensor:
    """Values on the host, once they are there."""
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
