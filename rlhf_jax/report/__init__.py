"""The report of runs: what they keep for it, and the page that shows it."""
