"""GGUF files for llama.cpp: a whole model, or a LoRA adapter beside its base model.

Only architectures and tokenizers are written for which tests/test_export.py compares llama.cpp's
tokens and probabilities with this project's own; others are refused.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch

from helpers import WorkbookError
from helpers.adapter_files import AdapterInfo
from helpers.data import prompt_ids

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
KINDS = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
              "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
ENDINGS = (".weight", ".bias")  # what llama.cpp's names of tensors keep
# How a tokenizer cuts text before it merges bytes, by llama.cpp's name: its pre-tokenizer's parts.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {"gpt-2": ["bytes+words"], "smollm": ["digits", "bytes+words"],
                  "qwen2": [_WORDS % r"\p{N}", "bytes"],
                  "llama-bpe": [_WORDS % r"\p{N}{1,3}", "bytes"]}


def check_gguf(config, tokenizer=None) -> None:
    """Refuse a model whose GGUF form is not proved. config: transformers' config of the model.
    Raises WorkbookError that says what is in the way."""
    wrong, reach = None, getattr(config, "max_position_embeddings", 0)
    if config.model_type not in ARCHITECTURES:
        wrong = f"of the architecture {config.model_type} (there are: {', '.join(ARCHITECTURES)})"
    elif (rope := config.rope_parameters["rope_type"]) != "default":
        wrong = f"with scaled rotary positions ({rope})"
    elif (getattr(config, "sliding_window", None) or reach) < reach:
        wrong = f"that looks back only {config.sliding_window:,} tokens (sliding_window)"
    elif config.hidden_act != "silu":
        wrong = f"with the activation {config.hidden_act}"
    elif config.model_type == "qwen3" and config.attention_bias:
        wrong = "with attention_bias, which llama.cpp's Qwen 3 lacks"
    elif tokenizer is not None and pre_tokenizer(tokenizer) is None:
        wrong = f"with this kind of tokenizer (there are: {', '.join(PRE_TOKENIZERS)})"
    if wrong:
        raise WorkbookError(f"A GGUF file of a model {wrong} is not written, as none was compared "
                            "with llama.cpp here: export --to merged and use llama.cpp's own "
                            "convert_hf_to_gguf.py.")


def pre_tokenizer(tokenizer) -> str | None:
    """llama.cpp's name of the way in which a byte-level BPE tokenizer cuts text, if it is known."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    whole = content["pre_tokenizer"] or {}
    parts = []
    for part in whole.get("pretokenizers", [whole]):
        if part.get("type") == "ByteLevel" and not part["add_prefix_space"]:
            parts.append("bytes+words" if part["use_regex"] else "bytes")
        elif part.get("type") == "Digits" and part["individual_digits"]:
            parts.append("digits")
        elif part.get("type") == "Split" and part["behavior"] == "Isolated":
            parts.append(part["pattern"].get("Regex"))
        else:
            parts.append(None)
    name = next((name for name, form in PRE_TOKENIZERS.items() if form == parts), None)
    whole_words = name == "llama-bpe"  # llama.cpp takes a word of the vocabulary without merging
    known = content["model"]["type"] == "BPE" and content["model"]["ignore_merges"] == whole_words
    return name if known else None


def write_model(model, tokenizer, path: Path, quantize: str = "f16") -> None:
    """Write a model and its tokenizer as one GGUF file. Matrices become `quantize`, a key of KINDS;
    vectors stay float32. Raises WorkbookError as `check_gguf`."""
    config = model.config
    check_gguf(config, tokenizer)
    writer, names = _begin(path, config)
    head = (getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(FILE_TYPES[quantize])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        kind = KINDS[quantize if tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 else "f32"]
        content = llama_rows(name, tensor.float().numpy(), config)
        writer.add_tensor(names.get_name(name, ENDINGS), gguf.quantize(content, kind),
                          raw_dtype=kind)
    _close(writer)


def write_lora(info: AdapterInfo, tensors: dict, config, path: Path, quantize: str = "f16") -> None:
    """Write an adapter as a GGUF file for llama.cpp's --lora. config: of its base model.

    llama.cpp multiplies B A by alpha / rank, the rank being the layer's own; the alpha written
    makes that `info.scaling`, and B of a layer that has another one is multiplied beforehand.
    Raises WorkbookError as `check_gguf`.
    """
    check_gguf(config)
    writer, names = _begin(path, config)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, info.scaling * info.rank)
    for module in info.modules:
        name = f"{module}.weight"
        for part, matrix in zip("ab", lora_pair(tensors, module), strict=True):
            content = matrix.float().numpy()
            if part == "b":  # its rows are those of the layer's weight; those of A are the ranks
                content = llama_rows(name, content, config)
                wanted, rank = info.scaling_of(module), matrix.shape[1]
                content = content * np.float32(wanted * rank / (info.scaling * info.rank))
            content = gguf.quantize(content, KINDS[quantize])
            writer.add_tensor(f"{names.get_name(name, ENDINGS)}.lora_{part}", content)
    _close(writer)


def lora_pair(tensors: dict, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of a layer, from the tensors of `read_tensors`."""
    return tuple(tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")


def llama_rows(name: str, content: np.ndarray, config) -> np.ndarray:
    """A tensor with its rows in llama.cpp's order, which is another one for q and k of Llama.

    transformers rotates number i of a head with number i + d/2, llama.cpp neighbours (2i, 2i + 1):
    the same rotation (RoPE, arXiv:2104.09864) once each head's halves are interleaved.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = name.split(".")[-2]
    if ARCHITECTURES[config.model_type] != "llama" or layer not in heads:
        return content
    halves = content.reshape(heads[layer], 2, -1, *content.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(content.shape)


def _begin(path: Path, config) -> tuple[gguf.GGUFWriter, gguf.TensorNameMap]:
    """A writer, and llama.cpp's names of the tensors."""
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(path.stem)
    kind = gguf.MODEL_ARCH[architecture.upper()]
    return writer, gguf.get_tensor_name_map(kind, config.num_hidden_layers)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, size: int) -> None:
    """Vocabulary, merges, and whether BOS stands before a prompt, as in training."""
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]  # rows of the embedding without a token
    types = [kinds.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, kinds.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = kinds.CONTROL if added.special else kinds.USER_DEFINED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(prompt_ids(tokenizer, "") == [tokenizer.bos_token_id])
    writer.add_chat_template(tokenizer.chat_template or "")
