"""Reward functions that come with the package; docs/rewards.md lists them."""
