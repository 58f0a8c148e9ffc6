"""`python -m stockpot`."""

from stockpot.cli.main import main

main()
