"""onebase: one frozen base model, many adapters.

Importing this package imports no torch: `onebase --help` answers at once, and settings can be read and checked on a
machine that has none.
"""

__version__ = "0.1.0"
