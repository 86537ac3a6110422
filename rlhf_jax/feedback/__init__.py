"""Judges in place of people: language models, servers, Python functions, simulated annotators."""
