"""Compiled blocks, and a training step as one recorded CUDA graph.

A small model's kernels end sooner than Python starts the next one. Recorded once, they are started
together (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import distributed
from torch._functorch import config as functorch_config

from helpers.trainer import CompletionTrainer

# What was recorded on a GPU. Other models may wait for it, which ends a recording with an error.
TRIED = {"llama": ("wrapped", "documents"), "qwen3": ("wrapped",), "bloom": ("wrapped",)}


def records_steps(config, model_type: str) -> bool:
    """Whether a run's steps can be recorded: all must have the same shapes, as packed rows have.

    Not with accumulation: a replay writes gradients and does not add to them.
    """
    return config.packing in TRIED.get(model_type, ()) and config.gradient_accumulation == 1


def transformer_blocks(model) -> torch.nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)  # others hold experts or a block's few parts


def compile_blocks(model, dynamic: bool = False, stored: float = 0.9) -> None:
    """torch.compile for every block: they share one compiled graph, so it takes seconds. dynamic:
    for rows of every length, a little slower. stored: share of the activations that are kept for
    the backward pass, which computes the cheapest others again; 0: none but a block's input, which
    is gradient checkpointing. At 0.9 an 8B step is as fast as at 1, with a fifth less memory."""
    functorch_config.activation_memory_budget = stored  # read when a block is first called
    for block in transformer_blocks(model):
        block.compile(dynamic=dynamic)


def undo_compile(model) -> None:
    """Blocks run as they did before `compile_blocks`, and torch stores what it does by default."""
    functorch_config.activation_memory_budget = 1.0
    for block in transformer_blocks(model):
        block._compiled_call_impl = None


class AveragedTrainer(CompletionTrainer):
    """A CompletionTrainer whose workers average the gradients after each pass.

    DistributedDataParallel would do it within the pass, by hooks that a recording does not allow
    and that do not know a shared weight. LoRA's gradients are small, so little is lost.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # accelerate's words for: without DistributedDataParallel around the model
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model,
                                                 evaluation_mode=True)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.one_pass(model, inputs, num_items_in_batch)
        if distributed.is_initialized():
            average([p.grad for group in self.optimizer.param_groups for p in group["params"]])
        return loss

    def one_pass(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward: the loss, detached."""
        return super().training_step(model, inputs, num_items_in_batch)


class RecordedTrainer(AveragedTrainer):
    """An AveragedTrainer whose step is recorded, for runs of which `records_steps` is true."""

    step = None

    def train(self, *arguments, **options):
        try:
            return super().train(*arguments, **options)
        finally:
            self.step = None  # a graph keeps its memory, and knows this trainer

    def one_pass(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.step is None:
            model.train()  # it walks through all modules, so not in every step
            trained = [p for p in model.parameters() if p.requires_grad]
            self.step = RecordedStep(
                lambda batch: self.compute_loss(model, batch, False, batch.get("count")), trained)
        count = {} if num_items_in_batch is None else {"count": num_items_in_batch}
        return self.step(self._prepare_inputs(inputs) | count)


class RecordedStep:
    """Forward and backward pass of a step. The first calls run as usual: they compile, and they
    choose kernels. Then the step is recorded, and every further call replays it.

    loss_of: a batch, {name: tensor}, to a scalar loss, without ever waiting for the GPU.
    parameters: what gets gradients. A graph repeats its kernels on the memory they were recorded
    with: every batch must have the first one's names and shapes and is copied to its place, and
    gradients cannot be accumulated over calls.
    """

    def __init__(self, loss_of: Callable[[dict], torch.Tensor], parameters, warm_up: int = 3):
        self.loss_of, self.parameters, self.warm_up = loss_of, list(parameters), warm_up
        self.calls, self.graph = 0, None

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, detached; gradients are then in the parameters' ``grad``, None before."""
        self.calls += 1
        if self.calls <= self.warm_up:
            loss = self.loss_of(batch)
            loss.backward()
            return loss.detach()
        if self.graph is None:
            self._record(batch)
        for name, place in self.batch.items():
            place.copy_(batch[name])
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    def _record(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        for parameter in self.parameters:
            parameter.grad = None  # the recorded backward pass must write gradients, not add
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            loss = self.loss_of(self.batch)
            loss.backward()
        self.loss, self.gradients = loss.detach(), [p.grad for p in self.parameters]


def average(gradients: list[torch.Tensor]) -> None:
    """Each gradient becomes its mean over all workers, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
