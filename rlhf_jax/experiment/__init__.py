"""One experiment as a whole: its config, its run, its final table, and its plan."""
