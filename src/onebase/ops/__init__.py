"""Arithmetic on tensors: each op with its plain reference in the same file. No model, no file, no settings."""
