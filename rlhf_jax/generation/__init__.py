"""Prompts to responses: sampling tokens, and responses as text."""
