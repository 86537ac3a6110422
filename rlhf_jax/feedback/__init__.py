"""Who judges in place of a person: simulated people, language models, servers, functions."""
