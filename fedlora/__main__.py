"""`python -m fedlora`, the same as the command `fedlora`."""

from .cli.app import main as main

if __name__ == "__main__":
    main()
