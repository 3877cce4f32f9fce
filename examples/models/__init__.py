"""Generators: a class each, and a command of its own."""
