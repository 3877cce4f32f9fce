"""Runs as HTML pages: `python -m examples.report FOLDER`."""
