"""`python -m fusionkit` is `fusionkit`."""

from fusionkit.cli.main import main

main()
