"""The formulas of the papers, one function each, on plain arrays."""
