"""Callerid: which job owns a connection that left this node, and the asking of other nodes.

The two sides of one question, which share nothing but the wire and the seal.
"""

from __future__ import annotations

from adoptd.callerid.answering import (
    OPENED_AT_ONCE,
    OPENED_AT_ONCE_OF_ONE,
    SETTLED_AT_ONCE,
    SETTLED_AT_ONCE_OF_ONE,
    USERS_WAITING,
    AnswerStage,
    Responder,
)
from adoptd.callerid.asking import Asker, AskFault, Told, reason_told
from adoptd.callerid.inquiry import Inquiry, Settled, reason_for
from adoptd.callerid.peers import Peer, Peers
from adoptd.callerid.sealing import AGENT_UID, Refused, SealRoom

__all__ = [
    "AGENT_UID",
    "OPENED_AT_ONCE",
    "OPENED_AT_ONCE_OF_ONE",
    "SETTLED_AT_ONCE",
    "SETTLED_AT_ONCE_OF_ONE",
    "USERS_WAITING",
    "AnswerStage",
    "AskFault",
    "Asker",
    "Inquiry",
    "Peer",
    "Peers",
    "Refused",
    "Responder",
    "SealRoom",
    "Settled",
    "Told",
    "reason_for",
    "reason_told",
]
