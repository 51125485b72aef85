"""The experiments: training, sweeps, and what they show; `python -m experiments --help`."""
