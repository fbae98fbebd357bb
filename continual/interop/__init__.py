"""Ours inside other people's frameworks, and theirs inside ours."""
