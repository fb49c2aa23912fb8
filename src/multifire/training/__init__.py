"""Train a network: the loop, a step, checkpoints, signals, the run's folder, several processes.

Read in this order: loop, state, data, step, meter, records, resume, guards, signals, checkpoint, run_folder, optim,
distributed, messages, trackers, load_run.
"""
