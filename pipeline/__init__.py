"""Batch video question answering on Ray: manifests in, pruned answers out as Parquet."""
