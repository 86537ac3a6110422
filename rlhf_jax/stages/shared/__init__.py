"""What several stages share: contexts, models, rewards, rollouts, plans."""
