"""The command-line programs: each module parses the arguments of one and calls one function."""
