"""Positions in the compiled profile, the flat float64 vector that the kernels read.

Header, then one row of terms per clock, then the decode table over (KV segment, batch, clock). Then, in parametric
profiles, where the search for the effective clock starts: (GHz, W per GHz, relative latency per GHz) at one prompt of
2^(k/16) tokens. In tabulated profiles the prefill grid: token knots, mean-length knots, and (latency, joules) over
(clock, tokens, mean length).
"""

PARAMETRIC, LINEAR, TABULATED = 0, 1, 2

# Header: integers stored as floats, then scalars.
KIND, CLOCKS, MAX_BATCH, TP = 0, 1, 2, 3
DECODE, BATCH_STRIDE, KV_SEGMENTS, KV_STEP = 4, 5, 6, 7
PREFILL, PREFILL_TOKEN_KNOTS, PREFILL_LENGTH_KNOTS = 8, 9, 10
LIMIT_W, LOWEST_GHZ, HIGHEST_GHZ = 11, 12, 13
# Closed form, latency.
HOST_S, HOST_S_PER_SEQUENCE, NORM = 14, 15, 16
LOG_KNEE_GHZ, KNEE_POWER, KNEE_SCALE, TENSOR_LIMIT_GHZ = 17, 18, 19, 20
LOG_WEIGHT_S, LOG_COMPUTE_S_GHZ, ATTENTION_S_GHZ, KV_S = 21, 22, 23, 24
REDUCE_S, REDUCE_FLAT, REDUCE_GHZ, REDUCE_S_PER_TOKEN = 25, 26, 27, 28
LAUNCH_S, LAUNCH_FLAT, LAUNCH_GHZ, ELEMENTWISE_S = 29, 30, 31, 32
# Closed form, power.
VOLTAGE_SLOPE, VOLTAGE_FLOOR, IDLE_W, IDLE_SPAN_W = 33, 34, 35, 36
WEIGHT_J, TOKEN_J, KV_J, CLOCK_W_PER_GHZ = 37, 38, 39, 40
LINEAR_J, HEAD_J, ATTENTION_J = 41, 42, 43
PREFILL_TOKENS_HALF, PREFILL_EXTRA = 44, 45
LIMIT_START, LOG_TENSOR_LIMIT_GHZ = 46, 47
HEADER = 48

# One row per clock, right after the header.
GHZ, IDLE, BASE_W, HEADROOM_W = 0, 1, 2, 3
FIXED_S, TOKEN_S, MEMORY_P, COMPUTE_P, SQUARE_S, KV_TOKEN_S, BUSY_W = 4, 5, 6, 7, 8, 9, 10
ROW = 12

# One decode entry.
A, C, N0, NK = 0, 1, 2, 3
ENTRY = 4

# Where the effective clock's search starts.
LIMIT_KNOTS_PER_OCTAVE, LIMIT_KNOTS = 16, 275
LIMIT_GHZ, LIMIT_W_PER_GHZ, LIMIT_LATENCY_PER_GHZ = 0, 1, 2
LIMIT_ENTRY = 3
