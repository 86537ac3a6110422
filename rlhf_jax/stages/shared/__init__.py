"""Code that several stages share; no stage of its own."""
