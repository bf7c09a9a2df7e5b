"""What survives a run or speaks for it: its folder and lock, checkpoints, log and meter, interruption, processes.

Read folder, checkpoint, log, meter, interruption, processes.
"""
