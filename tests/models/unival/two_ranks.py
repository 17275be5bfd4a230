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


def main(path: str) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model, batch = tiny_model(UnivalForConditionalGeneration, towers=["image"]), tiny_batch()
    labels = (batch["labels"] != -100).sum()
    # Gradients are averaged over the processes; a share of the whole batch's mean is to be added up.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)  # no row here has image codes
    loss = parallel(**share(batch, rank, count), num_items_in_batch=labels).loss * count
    loss.backward()
    dist.all_reduce(loss := loss.detach() / count)
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"count": count, "loss": loss, "gradients": gradients}, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
