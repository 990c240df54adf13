"""Benchmarks: one `bench_<op>` module per op over one harness."""
