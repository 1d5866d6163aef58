"""BiScale: placement, prefill and decode clock control."""
