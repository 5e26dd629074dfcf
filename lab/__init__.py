"""Experiments and tools around the three stages: run `python -m lab.NAME` in the project root."""
