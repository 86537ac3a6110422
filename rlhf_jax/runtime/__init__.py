"""Meshes, compiled train steps, the training loop, checkpoints and metrics.

Nothing in this room knows of language models: it works on trees of arrays.
"""
