"""The parts of the training program `examples/train.py`."""
