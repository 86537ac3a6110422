"""How good the trained models are: verdicts, win rates, the final table, the report."""
