"""What learns: the methods, the layers that wrap a target, and the bank that holds adapters on one base."""
