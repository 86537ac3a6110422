"""The network: one decoder for many families, as pure functions of parameters."""
