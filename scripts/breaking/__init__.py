"""Malformed and damaged inputs, and what runs them (scripts/break.py)."""
