"""Real serving under the same clock policies: vLLM workers, GPU clocks and power meters, safety, records."""
