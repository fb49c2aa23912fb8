"""Training: the loop, one step of it, checkpoints, signals, the run's folder, several processes.

Start reading at loop.py.
"""
