"""The parts of a training: processes, batches, optimizer, seeds, signals, and the state that is saved."""
