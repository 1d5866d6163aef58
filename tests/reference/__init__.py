"""A slow, plain simulator of the cluster that `docs/cluster.md` specifies: the oracle for the compiled engine."""
