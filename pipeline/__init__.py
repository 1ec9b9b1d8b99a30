"""Batch video question answering on Ray: manifests in, pruned answers out as Parquet."""

__version__ = "0.1.0"
