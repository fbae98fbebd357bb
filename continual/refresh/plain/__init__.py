"""A learner's model in files that stock libraries read."""
