"""What one runs beside the three stages: `python -m lab.NAME` from the root of the project."""
