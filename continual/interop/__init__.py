"""Other people's frameworks, both ways: a folder or a file for each, and nothing of them imported before it is used."""
