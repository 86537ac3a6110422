"""Plans: the memory, FLOPs, traffic and time that an experiment would need on other hardware."""
