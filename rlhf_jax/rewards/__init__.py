"""Where a score comes from: a reward model, a grading model, a function or a server."""
