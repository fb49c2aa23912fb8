"""Benchmarks: compare multifire, its reference and other frameworks on the same networks."""
