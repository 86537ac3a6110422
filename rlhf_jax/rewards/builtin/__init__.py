"""Reward functions that ship; docs/rewards.md lists them."""
