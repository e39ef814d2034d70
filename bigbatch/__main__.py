"""`python -m bigbatch` is the command `bigbatch`."""

import sys

from bigbatch.cli import main

sys.exit(main())
