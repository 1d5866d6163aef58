"""A request as the client of a live run sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.cluster.ledger import RequestLedger
from biscale_gym.cluster.placement import Phase
from biscale_gym.live.vllm_adapter.model import FIRST_TOKEN_ID


@dataclass(slots=True)
class Served:
    """A request as the client sees it; times from the start of the run.

    Attributes:
        number: in order of arrival.
        arrival_s, prompt_tokens, output_tokens: as the trace has them.
        attempt: 0, and one more each time that it is served from the start again.
        stage: the hop that it is at.
        worker, prefilled_by: where it is, who computed its prompt.
        sent_s, prefill_sent_s: when it was first sent, and when its last attempt was.
        first_token: prefill's.
        token_s: of prefill's token, and of decode's second and later ones.
        made: tokens of decode.
        agrees: whether decode's first token was prefill's.
        kv_params: where its KV lies.
        state: ``expected``, then ``finished``, ``failed``, ``rejected`` or ``unfinished``.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    attempt: int = 0
    stage: Phase | None = None
    worker: str = ""
    prefilled_by: str = ""
    sent_s: float = float("nan")
    prefill_sent_s: float = float("nan")
    first_token: int = -1
    token_s: list[float] = field(default_factory=list)
    made: int = 0
    agrees: bool = True
    kv_params: dict[str, Any] | None = None
    state: str = "expected"

    @property
    def id(self) -> str:
        """Unique over attempts."""
        return f"{self.number}.{self.attempt}"

    def prompt(self, seed: int, vocabulary: int) -> npt.NDArray[np.int32]:
        """Token ids of its prompt, int32[prompt_tokens], the same for the same seed."""
        rng = np.random.default_rng([seed, self.number])
        return rng.integers(FIRST_TOKEN_ID, vocabulary, self.prompt_tokens, dtype=np.int32)


def ledger_of(rows: Sequence[Served], names: Sequence[str]) -> RequestLedger:
    """The requests as metrics want them; a failed one counts as rejected.

    Args:
        rows: in order of arrival.
        names: of all workers; a worker's place is its number in the ledger.
    """
    numbers = {name: number for number, name in enumerate(names)}
    ended = [served.state == "finished" for served in rows]

    def times(value: Callable[[Served], float]) -> npt.NDArray[np.float64]:
        return np.array([value(served) for served in rows], dtype=np.float64)

    nan = float("nan")
    return RequestLedger(
        arrival_s=times(lambda served: served.arrival_s),
        prefill_start_s=times(lambda served: served.prefill_sent_s),
        first_token_s=times(lambda served: served.token_s[0] if served.token_s else nan),
        delivered_s=np.full(len(rows), nan),
        finish_s=times(lambda served: served.token_s[-1] if served.state == "finished" else nan),
        prompt_tokens=np.array([served.prompt_tokens for served in rows], dtype=np.int64),
        output_tokens=np.array([served.output_tokens for served in rows], dtype=np.int64),
        prefill_instance=np.array([numbers.get(served.prefilled_by, -1) for served in rows], dtype=np.int64),
        decode_instance=np.array(
            [numbers[served.worker] if served.stage == "decode" else -1 for served in rows], dtype=np.int64
        ),
        preemptions=np.zeros(len(rows), np.int64),
        finished=np.array(ended, dtype=np.bool_),
        rejected=np.array([served.state in ("rejected", "failed") for served in rows], dtype=np.bool_),
    )
