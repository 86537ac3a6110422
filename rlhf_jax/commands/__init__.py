"""The commands of the package: each parses its words and calls one function."""
