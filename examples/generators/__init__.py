"""Generators for collabvr.py: a class each, and a command each."""
