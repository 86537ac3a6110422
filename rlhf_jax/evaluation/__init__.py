"""How good models are: verdicts, win rates, the final table, the report."""
