"""The Gymnasium environments; ``import biscale_gym`` registers them."""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium

_ENVIRONMENTS = {
    "BiScale/Prefill-v0": ("instance:PrefillEnv", "instance:PrefillVectorEnv"),
    "BiScale/Cluster-v0": ("cluster:ClusterEnv", "cluster:ClusterVectorEnv"),
    "BiScale/Placement-v0": ("placement:PlacementEnv", "placement:placement_vector_env"),
    "BiScale/Decode-v0": ("instance:DecodeEnv", "instance:DecodeVectorEnv"),
}


_LIVE = "BiScale/Live-v0"


def register() -> None:
    """Make the ids known to Gymnasium; nothing is imported or compiled until one is made.

    ``BiScale/Live-v0`` is known only where vLLM is installed.
    """
    for name, (single, vector) in _ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=f"{__name__}.{single}", vector_entry_point=f"{__name__}.{vector}")
    if _LIVE not in gymnasium.registry and find_spec("vllm") is not None:
        gymnasium.register(_LIVE, entry_point="biscale_gym.live.environment:LiveEnv", nondeterministic=True)
