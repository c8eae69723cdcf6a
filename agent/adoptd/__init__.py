"""adoptd: puts ssh sessions on a compute node into the batch job they came from.

Importing this package has no effect; the entry points are in :mod:`adoptd.cli`.
"""

__version__ = "0.1.0"
