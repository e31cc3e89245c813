"""`python -m app.cli`, the same as `dcar`."""

from app.cli import main

main()
