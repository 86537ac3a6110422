"""Generates responses to prompts: samples tokens, and decodes them to text."""
