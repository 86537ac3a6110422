"""Evaluation of models: verdicts, win rates, the final table."""
