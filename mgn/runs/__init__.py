"""What a training run leaves and what happens to it: checkpoints, its folder and log, signals, its processes.

Read processes, files, checkpoint, folder, log, meter, interruption.
"""
