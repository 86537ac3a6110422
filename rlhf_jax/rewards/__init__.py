"""Where a score comes from: a model, a scorer, a function, a server."""
