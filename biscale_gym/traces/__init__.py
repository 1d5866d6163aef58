"""Request traces: reading, generating and cutting them; ``statistics``, ``catalogue`` and ``fitting`` are beside."""

from biscale_gym.traces.generators import generate, load_workload
from biscale_gym.traces.operations import (
    SPLIT_FRACTIONS,
    require_duration,
    scale_rate,
    slice_time,
    split_by_time,
    superpose,
    thin,
    truncate_to_context,
)
from biscale_gym.traces.readers import FORMATS, read_trace, write_trace
from biscale_gym.traces.settings import WorkloadSettings
from biscale_gym.traces.trace import Trace, TraceError

__all__ = [
    "FORMATS",
    "SPLIT_FRACTIONS",
    "Trace",
    "TraceError",
    "WorkloadSettings",
    "generate",
    "load_workload",
    "read_trace",
    "require_duration",
    "scale_rate",
    "slice_time",
    "split_by_time",
    "superpose",
    "thin",
    "truncate_to_context",
    "write_trace",
]
