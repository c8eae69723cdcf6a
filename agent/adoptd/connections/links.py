"""Which link a link-local address of this host is on.

Addresses of fe80::/10 are the same on every link (RFC 4007), so they travel between agents without a scope, and each
host adds its own. Owns the reading of PROC/net/if_inet6. Never chooses between two links. Called by callerid's Asker.
"""

from __future__ import annotations

import errno
import ipaddress
from pathlib import Path

from adoptd.model import IPAddress

# Columns of a row (if6_seq_show, net/ipv6/addrconf.c): the address and, in hexadecimal too, its device's index.
_ADDRESS_COLUMN, _INDEX_COLUMN = 0, 1


def is_link_local(address: IPAddress) -> bool:
    """Whether ``address`` means nothing without a scope. IPv4's link-local addresses do."""
    return isinstance(address, ipaddress.IPv6Address) and address.is_link_local


def scope_of(address: IPAddress, proc_root: str = "/proc") -> int:
    """The index of the device that has ``address``, in the caller's network namespace.

    Raises OSError, ENODEV naming the address unless exactly one device has it.
    """
    wanted = address.packed.hex()
    rows = [row.split() for row in (Path(proc_root) / "net" / "if_inet6").read_text("ascii").splitlines()]
    found = {int(row[_INDEX_COLUMN], 16) for row in rows if row[_ADDRESS_COLUMN] == wanted}
    if len(found) != 1:
        raise OSError(errno.ENODEV, f"{address} is an address of {len(found)} links here, expected 1")
    return found.pop()
