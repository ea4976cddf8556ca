"""Adapters: their files, the bank that swaps them on one base model, and generation."""

from helpers.adapter_files import (CONFIG, METRICS, PREBUILT, WEIGHTS, AdapterInfo, Discovered,
                                   discover, read_adapter, read_tensors)
from helpers.adapter_layers import MAX_RANK, layer_shapes
from helpers.bank import AdapterBank
from helpers.generation import Answer, Settings
from helpers.registry import EMBEDDED

__all__ = ["CONFIG", "EMBEDDED", "MAX_RANK", "METRICS", "PREBUILT", "WEIGHTS", "AdapterBank",
           "AdapterInfo", "Answer", "Discovered", "Settings", "discover", "layer_shapes",
           "read_adapter", "read_tensors"]
