"""`python -m onebase` is the `onebase` command."""

from onebase.cli.app import main

if __name__ == "__main__":
    main()
