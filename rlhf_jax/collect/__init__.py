"""The web application in which people demonstrate, rank, edit and converse."""
