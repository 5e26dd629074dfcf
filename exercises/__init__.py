"""Twelve exercises: the text is README.md, the checks are check.py."""
