"""Callerid: which job owns a connection that left this node, and the asking of other nodes.

The two sides of one question, which share nothing but the wire and the seal.
"""

from __future__ import annotations

from adoptd.callerid.answering import SETTLED_AT_ONCE, SETTLED_AT_ONCE_OF_ONE, Inquiry, Responder, Settled
from adoptd.callerid.asking import Asker, AskFault, Told
from adoptd.callerid.sealing import AGENT_UID, Refused, SealRoom

__all__ = [
    "AGENT_UID",
    "SETTLED_AT_ONCE",
    "SETTLED_AT_ONCE_OF_ONE",
    "AskFault",
    "Asker",
    "Inquiry",
    "Refused",
    "Responder",
    "SealRoom",
    "Settled",
    "Told",
]
