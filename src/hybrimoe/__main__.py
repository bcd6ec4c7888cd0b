"""`python -m hybrimoe` is the `hybrimoe` command."""

import sys

from hybrimoe.cli import main

sys.exit(main())
