"""The pages of the site, which are functions (Visit) → Response."""
