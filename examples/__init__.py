"""Programs around collabvr.py, each run from the root as `python -m examples.NAME`."""
