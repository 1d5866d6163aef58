"""What a clock policy sees: the layout of the feature vector that the engine fills at every decision point.

A vector of ``SIZE`` float64. The first entries are common to both phases; the meaning from ``WORK_LEFT``/``BATCH`` on
depends on the phase. See docs/policies.md for units and ranges.
"""

SIZE = 48

# Why the policy is asked (value of REASON).
BOUNDARY = 0
"""A batch is about to start."""
ARRIVAL = 1
"""A prompt joined the queue while a batch runs (prefill only)."""
OVERRUN = 2
"""The running iteration has lasted longer than predicted by more than the overrun margin."""
IDLE = 3
"""The instance has nothing to run."""
INTERVAL = 4
"""An iteration runs; the caller asks everyone at this moment (``Simulator.ask_everyone``)."""

# Entries common to both phases.
NOW_S = 0
REASON = 1
CLOCK = 2
"""Index of the clock in force."""
TARGET = 3
"""Index of the clock last asked for."""
SWITCH_PENDING = 4
CLOCK_COUNT = 5
SLO_S = 6
"""Prefill: the TTFT SLO less the serving overhead. Decode: the TPOT SLO."""
LAST_OBSERVED_S = 7
"""Duration of the last complete iteration (on OVERRUN: elapsed so far of the running one); 0 before the first."""
LAST_PREDICTED_S = 8
"""What ``model`` predicted for it under the clocks that held."""
KV_TOKENS = 9
KV_CAPACITY_TOKENS = 10
QUEUE_REQUESTS = 11
"""Prefill: prompts waiting behind the batch. Decode: waiting for memory, in transfer, or waiting for the boundary."""
QUEUE_TOKENS = 12
TP = 13
ROUTED = 40
"""Requests that were routed to the instance so far."""
COMPLETED = 41
"""Requests whose phase was completed by the instance so far: first tokens out, or requests finished."""
LATE = 42
"""Those of them that broke the phase's SLO."""

# Decode.
BATCH = 14
BATCH_KV_TOKENS = 15
RECOMPUTE_TOKENS = 16
RECOMPUTE_SUM_SQ = 17
ITERATION = 18
SLACK_LEAST_S = 19
"""The next five, for a policy that asks for them: accumulated TPOT slack over the requests of the batch, least and
quantiles. A request's slack is what it may lose and still meet its TPOT if its output ended here: first token + SLO *
tokens since - now."""
SLACK_P1_S = 20
SLACK_P5_S = 21
SLACK_P25_S = 22
SLACK_P50_S = 23

# Prefill.
WORK_LEFT = 14
"""Share of projected batch 0 still to do: 1 at a boundary, less inside a batch."""
BATCHES = 15
"""Number of projected batches, 0 to HORIZON; batch 0 is the one about to start, or running."""
BATCH_FIRST = 16
"""Batch j has its TOKENS, SUM_SQ and OLDEST_ARRIVAL_S at BATCH_FIRST + BATCH_STRIDE * j + (0, 1, 2)."""
BATCH_STRIDE = 3
BATCH_TOKENS = 0
BATCH_SUM_SQ = 1
BATCH_OLDEST_ARRIVAL_S = 2
HORIZON = 8
