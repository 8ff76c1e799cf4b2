"""Checkpoints of a run: one folder per step, complete once its manifest is."""
