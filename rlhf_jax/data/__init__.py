"""Records, their sources, encoding and batches; and the embedded world."""
