"""BiScale: placement, prefill and decode clock control, and the class tables that planners share."""
