"""The trace-driven model of a prefill/decode-disaggregated cluster: placement, compiled engine, ledger."""
