"""`python -m hybrimoe` is the `hybrimoe` command."""

import sys

from hybrimoe.cli.main import main

sys.exit(main())
