"""What scripts/benchmark.py is made of: the same work in this library and in its peers."""
