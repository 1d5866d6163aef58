"""vLLM's server: how it is started, asked and read.

Two hops make a request, as in vLLM's own example of a proxy for disaggregated prefill: a prefill server answers a
prompt with one token and says where its KV lies; a decode server gets the same prompt with that, and streams all
tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biscale_gym.live.errors import LiveError
from biscale_gym.live.setups import Setup
from biscale_gym.live.vllm_adapter.install import TESTED
from biscale_gym.live.vllm_adapter.options import PREFILL_PARAMS, engine_options

COMPLETIONS, METRICS, MODELS, VERSION = "/v1/completions", "/metrics", "/v1/models", "/version"
REQUEST_ID = "X-Request-Id"
SCHEDULER_CLASS = "biscale_gym.live.plugin.GovernedScheduler"
CPU_WORKER_CLASS = "biscale_gym.live.plugin.CpuWorker"
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_KV_USAGE = "vllm:kv_cache_usage_perc"
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})? (\S+)$")


@dataclass(frozen=True, slots=True)
class Served:
    """What a server offers.

    Attributes:
        model: its name.
        max_model_len: longest prompt plus output.
        version: of vLLM.
    """

    model: str
    max_model_len: int
    version: str

    @property
    def tested(self) -> bool:
        """Whether this adapter was tested with the version."""
        return self.version in TESTED


@dataclass(frozen=True, slots=True)
class Metrics:
    """A server's own numbers, all its engines together.

    Attributes:
        running, waiting: requests.
        kv_usage: share of the KV blocks that is taken, of the fullest engine.
        prompt_tokens: since its start, by source: computed (``local_compute``), fetched (``FETCHED``).
    """

    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: dict[str, int]


def served_by(models: bytes, version: bytes, url: str) -> Served:
    """From the answers to MODELS and VERSION.

    Raises:
        LiveError: they are not a vLLM server's.
    """
    try:
        model = json.loads(models)["data"][0]
        return Served(model["id"], int(model["max_model_len"]), json.loads(version)["version"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LiveError(f"{url} does not answer as a vLLM server does ({error!r})") from error


def read_metrics(text: str, url: str) -> Metrics:
    """From the answer to METRICS.

    Raises:
        LiveError: a number is missing; the versions of vLLM that have it are named.
    """
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in (_RUNNING, _WAITING, _KV_USAGE, _BY_SOURCE)}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample and sample[1] in found:
            found[sample[1]].append((sample[2] or "", float(sample[3])))
    missing = [name for name, samples in found.items() if not samples]
    if missing:
        raise LiveError(
            f"{url}{METRICS} has no {', '.join(missing)}, which vLLM {', '.join(TESTED)} has; "
            "was it started without statistics?"
        )
    tokens: dict[str, int] = {}
    for labels, value in found[_BY_SOURCE]:
        source = re.search(r'source="([^"]*)"', labels)
        if source:
            tokens[source[1]] = tokens.get(source[1], 0) + int(value)
    return Metrics(
        int(sum(value for _, value in found[_RUNNING])),
        int(sum(value for _, value in found[_WAITING])),
        max(value for _, value in found[_KV_USAGE]),
        tokens,
    )


def _body(model: str, prompt: Sequence[int], output_tokens: int, told: dict[str, float]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "return_token_ids": True,
        "vllm_xargs": told,
    }


def prefill_body(model: str, prompt: Sequence[int], keep_kv: bool, told: dict[str, float]) -> dict[str, Any]:
    """The first hop: one token; ``keep_kv``: a decode server will fetch the KV."""
    transfer = {"kv_transfer_params": PREFILL_PARAMS} if keep_kv else {}
    return _body(model, prompt, 1, told) | transfer


def decode_body(
    model: str, prompt: Sequence[int], output_tokens: int, kv_params: dict[str, Any], told: dict[str, float]
) -> dict[str, Any]:
    """The second hop: all tokens, streamed."""
    return _body(model, prompt, output_tokens, told) | {"kv_transfer_params": kv_params, "stream": True}


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer.

    Attributes:
        tokens: new ones.
        finish: why it ends here, if it does; ``length`` is as it should be.
        kv_params: where the KV of a prompt lies.
    """

    tokens: list[int]
    finish: str | None
    kv_params: dict[str, Any] | None


def read_piece(answer: dict[str, Any]) -> Piece:
    """From a whole answer, or an event of a streamed one.

    Raises:
        LiveError: it is neither.
    """
    try:
        choices = answer["choices"]
        if not choices:  # an event that counts tokens alone
            return Piece([], None, None)
        choice = choices[0]
        return Piece(list(choice.get("token_ids") or ()), choice["finish_reason"], answer.get("kv_transfer_params"))
    except (KeyError, IndexError, TypeError) as error:
        raise LiveError(f"not an answer of a vLLM server ({error!r}): {str(answer)[:300]}") from error


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"


def server_command(setup: Setup, port: int) -> list[str]:
    """To start a governed server on 127.0.0.1, in its ``environment``.

    Args:
        setup: of the instance.
        port: to listen on.
    """
    options = engine_options(setup) | {
        "host": "127.0.0.1",
        "port": port,
        "served_model_name": "served",
        "scheduler_cls": SCHEDULER_CLASS,
        "disable_uvicorn_access_log": True,
    }
    if setup.settings.engine == "cpu":
        options["worker_cls"] = CPU_WORKER_CLASS
    # `vllm serve` is not to be had with the CPU build: its script asks for a distribution of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return command + [_option(name.replace("_", "-"), value) for name, value in options.items()]
