"""What is kept on disk: adapters in PEFT's format, run folders, checkpoints, results, model cards.

Everything is written to a hidden name, synced and renamed (`atomic`); nothing is ever pickled. Importing this room
imports no torch.
"""
