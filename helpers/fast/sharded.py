"""A base model too large for one GPU: each worker keeps a part of every block's frozen weights.

A block's parts are gathered when it computes, in the forward and again in the backward pass, and
freed after it: fully sharded data parallelism (FSDP2,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). 4-bit weights stay packed,
so a gather moves half a byte per weight. LoRA's weights are small, so every worker has all of them:
checkpoints and adapter files are those of any other run.
"""

from __future__ import annotations

import torch
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.fast.recorded import AveragedTrainer, transformer_blocks


def shard(model, device: torch.device) -> None:
    """Share the frozen weights of a model's blocks among the workers; the rest goes to `device`.

    model: loaded on the CPU, LoRA put on, only LoRA's parameters trainable. Called on all workers.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = transformer_blocks(model)
    frozen = {p for p in blocks.parameters() if not p.requires_grad}
    kept = {p for p in model.parameters() if p not in frozen}
    for parameter in frozen:
        if parameter.dtype == torch.uint8:  # packed 4-bit weights: torch 2.11 shares floats only
            parameter.data = parameter.data.flatten().view(torch.bfloat16)[:, None]
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)  # its scales come to the GPU with it
    fully_shard(model, mesh=mesh, ignored_params=kept)  # the next block is fetched in advance
    for tensor in [*kept, *model.buffers()]:
        tensor.data = tensor.data.to(device)
    model.hf_device_map = {"": device}  # accelerate refuses a 4-bit model that is on the CPU


class ShardedTrainer(AveragedTrainer):
    """A CompletionTrainer for a model that `shard` has shared."""

    def own_part(self, batches: list) -> list:
        """All: a block is gathered only when every worker computes it."""
        return batches
