"""`python -m pipeline` is the `mergetune` command."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
