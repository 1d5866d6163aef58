"""The model that workers run: a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

from biscale_gym.live.errors import LiveError
from biscale_gym.profiles.settings import ModelSettings

FIRST_TOKEN_ID = 4
"""Token ids below are special ones."""


def write_model(folder: Path, dimensions: ModelSettings, max_model_len: int) -> Path:
    """A folder with the configuration of a Llama; vLLM makes up its weights, the same in every process.

    Raises:
        LiveError: the model is no Llama.
    """
    if dimensions.mlp_matrices != 3:
        raise LiveError("only models of Llama's form can have made-up weights; name a folder with real ones (weights)")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": dimensions.vocabulary,
        "hidden_size": dimensions.hidden_size,
        "intermediate_size": dimensions.mlp_size,
        "num_hidden_layers": dimensions.layers,
        "num_attention_heads": dimensions.attention_heads,
        "num_key_value_heads": dimensions.kv_heads,
        "head_dim": dimensions.head_dim,
        "max_position_embeddings": max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
