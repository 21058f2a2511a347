"""``python -m wiseflow_nb``: the command line."""

from __future__ import annotations

from wiseflow_nb.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
