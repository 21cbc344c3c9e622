"""`python -m kvfabric`: the console script, for an environment whose scripts are not on the path."""

import sys

from kvfabric.cli import main

sys.exit(main())
