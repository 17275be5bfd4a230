"""What each process of ``torchrun`` does for the test of distributed data parallel: its half of a batch, forward and
backward; the first one saves the loss, the gradients and the number of processes."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from tests.models.unival.tiny import tiny_batch, tiny_model


def share(batch: dict[str, torch.Tensor], rank: int, count: int) -> dict[str, torch.Tensor]:
    """Every so many-th row of a batch."""
    return {name: values[rank::count] for name, values in batch.items()}


def half_of_the_work() -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The loss of the whole batch, and this process's gradients of it, which are those of all."""
    rank, count = dist.get_rank(), dist.get_world_size()
    model, batch = tiny_model(UnivalForConditionalGeneration, towers=["image"]), tiny_batch()
    labels = (batch["labels"] != -100).sum()
    # Gradients are averaged over the processes; a share of the whole batch's mean is to be added up.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)  # no row here has image codes
    loss = parallel(**share(batch, rank, count), num_items_in_batch=labels).loss * count
    loss.backward()
    dist.all_reduce(loss := loss.detach() / count)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def main(path: str) -> None:
    dist.init_process_group("gloo")
    loss, gradients = half_of_the_work()  # nothing that holds the group lives on: it would wait for the other process
    if dist.get_rank() == 0:
        torch.save({"count": dist.get_world_size(), "loss": loss, "gradients": gradients}, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
