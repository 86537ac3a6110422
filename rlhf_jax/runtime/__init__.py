"""Meshes, compiled train steps, the training loop, checkpoints and metrics.

Nothing here depends on language models: this package works on trees of arrays.
"""
