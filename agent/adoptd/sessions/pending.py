"""What the account phase decided, kept until the session phase of the same login asks.

sshd runs the account phase of a keyboard-interactive login in a short-lived child, and the session
phase in the process that will be the session's parent; the two share a connection and a user, nothing
else. Bounded in number and time. It outlives the agent: a user whom another module let in, after we could not tell
their job, would else be refused by the session phase after a restart. For one event loop. Called by
:mod:`adoptd.adoption`.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Callable, Dict, Optional, Tuple

from adoptd import log
from adoptd.model import Connection, ProtocolError
from adoptd.sessions.settled import PendingLogin, Settlement, decode_login, encode_login
from adoptd.sessions.store import SessionStore, StoreError, boot_id

# sshd gives a login 120 s (LoginGraceTime) between its connection and its session; sites raise it for
# slow second factors. Ten minutes covers them, and an entry is about 1 KiB.
KEEP_S = 600.0
CAPACITY = 4096


class PendingLogins:
    """Settlements by user and connection; the oldest go first when there are too many."""

    def __init__(
        self,
        clock: Callable[[], float],
        keep_s: float = KEEP_S,
        capacity: int = CAPACITY,
        store: Optional[SessionStore] = None,
    ) -> None:
        """``clock`` is monotonic. ``store``: where they outlive the agent; None: nowhere."""
        self._clock = clock
        self._keep_s = keep_s
        self._capacity = capacity
        self._store = store
        self._boot_id = "" if store is None else boot_id()
        self._entries: OrderedDict[Tuple[int, Connection], PendingLogin] = OrderedDict()
        # What is to become of files, by name, None: they go. As soon as nobody waits for it.
        self._due: Dict[str, Optional[PendingLogin]] = {}
        self._unwritten = False

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, uid: int, connection: Connection, settlement: Settlement) -> None:
        """Keep ``settlement`` in place of an earlier one of the same login. Its file is :meth:`write_due`'s."""
        self._keep(PendingLogin(uid, connection, self._clock() + self._keep_s, settlement))
        self._drop_old()

    def take(self, uid: int, connection: Connection) -> Optional[Settlement]:
        """The settlement of this login, once; None if there is none or it is too old."""
        login = self._entries.pop((uid, connection), None)
        if login is None:
            return None
        self._owe(login.name, None)
        return None if login.expires_at_s <= self._clock() else login.settlement

    def awaits(self, uid: int, connection: Connection) -> bool:
        """Whether the account phase of this login has been here, and its session phase has not."""
        login = self._entries.get((uid, connection))
        return login is not None and login.expires_at_s > self._clock()

    def write_due(self) -> None:
        """Have the files say what is remembered."""
        due, self._due = self._due, {}
        for name, login in due.items():
            if self._store is None:
                return
            try:
                if login is None:
                    self._store.remove(name)
                else:
                    self._store.write(name, encode_login(login, self._boot_id))
                self._unwritten = False
            except StoreError as error:
                # Once for a disk that is full or gone, not for each login.
                if not self._unwritten:
                    log.error("login_not_written", error=str(error), effect="not known after a restart")
                self._unwritten = True

    def restore(self) -> int:
        """Take up what an agent before this one kept, as far as it is not too old. Returns how much.

        What is no file of ours, or of another boot, is removed, and how much that was is said. Raises StoreError if
        the directory cannot be read.
        """
        if self._store is None:
            return 0
        faults = []
        found = []
        for name, data in self._store.files():
            try:
                if isinstance(data, str):
                    raise ProtocolError(data)
                login = decode_login(data, name, self._boot_id)
            except ProtocolError as error:
                faults.append(f"{name}: {error}")
                login = None
            # Later than a login of now would be: not written by us.
            if login is None or not 0 < login.expires_at_s - self._clock() <= self._keep_s:
                with contextlib.suppress(StoreError):
                    self._store.remove(name)
                continue
            found.append(login)
        if faults:
            log.warning("logins_refused", files=len(faults), error=faults[0])
        for login in sorted(found, key=lambda each: each.expires_at_s):
            self._entries[login.uid, login.connection] = login
        self._drop_old()
        return len(self._entries)

    def close(self) -> None:
        """What is kept on disk stays."""
        self.write_due()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _keep(self, login: PendingLogin) -> None:
        key = login.uid, login.connection
        self._entries.pop(key, None)
        self._entries[key] = login
        self._owe(login.name, login)

    def _owe(self, name: str, login: Optional[PendingLogin]) -> None:
        if self._store is not None:
            self._due[name] = login

    def _drop_old(self) -> None:
        now = self._clock()
        while self._entries:
            login = next(iter(self._entries.values()))
            if login.expires_at_s > now and len(self._entries) <= self._capacity:
                return
            self._entries.popitem(last=False)
            self._owe(login.name, None)
