"""Comparison of controllers: a matrix of runs, records that can be replayed, tables, statistics and plots."""
