"""How good a VLM is as planner and verifier: `python -m examples.supervisor`."""
