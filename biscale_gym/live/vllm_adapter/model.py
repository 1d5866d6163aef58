"""The model that workers run: a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

from biscale_gym.live.settings import TinyModelSettings

FIRST_TOKEN_ID = 4
"""Token ids below are the tiny model's special ones."""


def write_model(folder: Path, settings: TinyModelSettings, max_model_len: int) -> Path:
    """A folder with the configuration of a Llama; vLLM makes up its weights, the same in every process."""
    heads = settings.hidden_size // 64
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 64,
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
