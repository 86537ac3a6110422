"""Who judges in place of people: models, servers, functions, annotators."""
