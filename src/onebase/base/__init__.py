"""The one frozen model: found, fetched, opened, fingerprinted, and its modules listed."""
