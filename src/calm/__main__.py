"""``python -m calm`` is the ``calm`` command."""

from calm.cli.main import main

if __name__ == "__main__":
    main()
