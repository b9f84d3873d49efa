"""`python -m batchstream`, and the console script."""

from __future__ import annotations

from batchstream.cli.main import main

if __name__ == "__main__":
    main()
