"""Adapters: their files, the bank that swaps them on one base model, and generation."""

from helpers.adapter_files import (CONFIG, MAX_RANK, METRICS, PREBUILT, WEIGHTS, AdapterInfo,
                                   Discovered, discover, layer_shapes, read_adapter, read_tensors)
from helpers.bank import AdapterBank
from helpers.generation import Answer, Settings
from helpers.registry import EMBEDDED

__all__ = ["CONFIG", "EMBEDDED", "MAX_RANK", "METRICS", "PREBUILT", "WEIGHTS", "AdapterBank",
           "AdapterInfo", "Answer", "Discovered", "Settings", "discover", "layer_shapes",
           "read_adapter", "read_tensors"]
