"""What an experiment would need of hardware that is not here."""
