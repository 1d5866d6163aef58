"""A made-up CPU worker behind an emulated device: what it takes is known."""

from __future__ import annotations

from biscale_gym.profiles import Profile

CLOCKS = (750, 1290, 1980)
HOST_MS = {"prefill": (1.2, 0.0), "decode": (0.5, 0.05)}
SLEPT = {"prefill": (0.3, 0.12), "decode": (0.8, 0.05)}
"""What a batch below the top clock takes longer, before it is stretched: so much, and a share of it."""
MODEL = {
    "layers": 4,
    "hidden_size": 256,
    "attention_heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp_size": 768,
    "mlp_matrices": 3,
    "vocabulary": 1024,
    "context_tokens": 2048,
    "precisions": ["bf16"],
}
PROVENANCE = {
    "identity": {
        "device": "a processor",
        "model": MODEL,
        "precision": "bf16",
        "kv_capacity_tokens": 32768,
        "emulates": {
            "hardware": "h100-sxm5",
            "model": "llama-3.3-70b",
            "precision": "fp8",
            "decode_precision": None,
            "clocks_mhz": list(CLOCKS),
        },
    },
    "power": "absent",
}


def batch_ms(batch: float, kv: float, tokens: float, squares: float) -> float:
    """What the made-up worker computes for a batch at the top clock."""
    if batch:
        return 3.0 + 0.1 * batch + 2e-4 * kv
    return 4.0 + 0.02 * tokens + 4e-6 * squares


def truth(emulated: Profile, clock: int, batch: float, kv: float, tokens: float, squares: float) -> tuple[float, float]:
    """Latency and host part [ms] of the made-up worker behind an emulated device."""
    fixed, each = HOST_MS["decode" if batch else "prefill"]
    host = fixed + each * (batch or tokens)
    work = (batch, kv, tokens, squares)
    factor = float(emulated.latency_ms(2, clock, *work) / emulated.latency_ms(2, CLOCKS[-1], *work))
    more, share = SLEPT["decode" if batch else "prefill"] if clock != CLOCKS[-1] else (0.0, 0.0)
    return host + factor * (more + (1 + share) * batch_ms(*work)), host
