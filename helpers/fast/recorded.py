"""A training step as one recorded CUDA graph, for packed rows on one GPU, where all steps have the same shapes.

Python starts the kernels of a step one by one, thousands of them, and a small model's kernels end sooner than the next one is
started. Recorded once, they are started together (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAME = "causal_sdpa"  # under this name the attention is registered with transformers


class RecordedStep:
    """Forward and backward pass of a step. The first calls run as usual: they compile, and they choose kernels; then the step is
    recorded, and every further call replays it.

    loss_of: a batch, {name: tensor}, to a scalar loss, without ever waiting for the GPU; parameters: what gets gradients.
    A graph repeats its kernels on the memory they were recorded with: every batch must have the first one's shapes and is
    copied to its place, and each replay leaves the gradients in the same memory, so they cannot be accumulated over calls.
    """

    def __init__(self, loss_of: Callable[[dict], torch.Tensor], parameters, warm_up: int = 3):
        self.loss_of, self.parameters, self.warm_up = loss_of, list(parameters), warm_up
        self.calls, self.graph = 0, None

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, detached; gradients are then in the parameters' ``grad``, which must be None before.

        Raises ValueError for a batch of other names or shapes than the recorded one.
        """
        self.calls += 1
        if self.calls <= self.warm_up:
            loss = self.loss_of(batch)
            loss.backward()
            return loss.detach()
        if self.graph is None:
            self._record(batch)
        recorded, given = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (self.batch, batch))
        if recorded != given:  # copy_ would spread a smaller tensor over the place of a larger one
            raise ValueError(f"The step was recorded with batches of {recorded}, and this one is {given}: they must be alike.")
        for name, place in self.batch.items():
            place.copy_(batch[name])
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    def _record(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        for parameter in self.parameters:
            parameter.grad = None  # so that the recorded backward pass writes gradients instead of adding to them
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            loss = self.loss_of(self.batch)
            loss.backward()
        self.loss, self.gradients = loss.detach(), [parameter.grad for parameter in self.parameters]


def use_plain_causal_attention(model) -> bool:
    """Let a batch without a mask mean plain causal attention, in a Llama that has been loaded with torch's fused attention.

    transformers looks into such a batch's positions for packed documents, which waits for the GPU in every step; while a graph
    is recorded it cannot look, and stores a mask of all pairs. An empty mask, (0, 0, 0, length), is passed through to here
    instead. Returns whether the model was changed: only Llama, which does nothing else with a mask. Other models find positions
    in it, or the window that a layer sees.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config.model_type != "llama" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    model.base_model.register_forward_pre_hook(empty_mask, with_kwargs=True)  # PEFT passes the outer model's hooks by
    return True


def _attend(module, query, key, value, attention_mask, **options):
    """transformers' fused attention, to which an empty mask is none."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    empty = attention_mask is not None and not attention_mask.numel()
    return sdpa_attention_forward(module, query, key, value, None if empty else attention_mask, **options)


def empty_mask(model, arguments, options):
    """Before a backbone's forward: no mask, no positions and nothing cached becomes an empty mask, (0, 0, 0, length), which
    stands for: only the future is hidden."""
    ids = options.get("input_ids", arguments[0] if arguments else None)
    others = (options.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if ids is not None and all(other is None for other in others):
        options["attention_mask"] = torch.empty(0, 0, 0, ids.shape[1], device=ids.device)
    return arguments, options
