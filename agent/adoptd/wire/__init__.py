"""Codecs for every message that crosses a process boundary. Bytes in, values out: no I/O, no clock.

Each decoder either returns a complete, validated value or raises ProtocolError; there is no third
outcome and no partial value. Used by :mod:`adoptd.callerid`, :mod:`adoptd.adoption` and the servers.
"""
