"""``python3 -m adoptd`` is ``adoptd``."""

import sys

from adoptd.cli import adoptd_main

sys.exit(adoptd_main())
