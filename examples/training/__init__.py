"""The training program in parts; `train.py` is its command line."""
