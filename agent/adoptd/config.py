"""The configuration: typed, frozen, complete. A file that is not understood stops the start.

Owns the keys, their bounds and their defaults, and the reading of ``adoptd.toml`` and of the
``conf.d/*.toml`` beside it (in name order; a later file wins key by key). Must never turn a bad value
into a default. Called by the service, by ``adoptd config`` and by the tests.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Tuple, Type

from adoptd.jobs.environment import parse_pattern
from adoptd.jobs.template import JobPath, parse_leaf
from adoptd.messages import CONTACT_MAX, Notice, is_contact
from adoptd.model import ConfigError
from adoptd.probe.record import WATCHED_PORTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_FILE = Path("/etc/adoptd/adoptd.toml")

# A configuration is a page of text; a larger file is some other file.
_FILE_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class _Rule:
    """What a key accepts, in words for the message, and as a check. ``restart``: a reload cannot change it."""

    expected: str
    accepts: Callable[[object], bool]
    restart: bool


def _rule(expected: str, accepts: Callable[[object], bool], restart: bool) -> Mapping[str, _Rule]:
    return {"rule": _Rule(expected, accepts, restart)}


def _boolean(restart: bool = False) -> Mapping[str, _Rule]:
    return _rule("true or false", lambda value: isinstance(value, bool), restart)


def _integer(low: int, high: int, unit: str = "", restart: bool = False) -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return _rule(f"a whole number in {low}..{high}{unit}", accepts, restart)


def _choice(*words: str, restart: bool = False) -> Mapping[str, _Rule]:
    return _rule("one of " + ", ".join(f'"{word}"' for word in words), lambda value: value in words, restart)


def _path(optional: bool = False, restart: bool = False) -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        if not isinstance(value, str) or "\0" in value:
            return False
        return value.startswith("/") or (optional and value == "")

    return _rule("an absolute path" + (' or ""' if optional else ""), accepts, restart)


def _accepted_by(parse: Callable[[str], object]) -> Callable[[object], bool]:
    def accepts(value: object) -> bool:
        if not isinstance(value, str):
            return False
        try:
            parse(value)
        except ValueError:
            return False
        return True

    return accepts


def _socket_path() -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return isinstance(value, str) and value.startswith("/") and "\0" not in value and len(value.encode()) <= 107

    return _rule("an absolute path of at most 107 bytes (unix(7))", accepts, True)


def _leaf() -> Mapping[str, _Rule]:
    return _rule('a path relative to the job\'s cgroup, such as "session", or ""', _accepted_by(parse_leaf), False)


def _is_address(value: object) -> bool:
    return _accepted_by(ipaddress.ip_address)(value)


def _address(restart: bool = False) -> Mapping[str, _Rule]:
    return _rule("an IP address", _is_address, restart)


def _addresses(restart: bool = False) -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return isinstance(value, tuple) and len(value) > 0 and all(_is_address(item) for item in value)

    return _rule("a list of one or more IP addresses", accepts, restart)


def _ports(most: int, restart: bool = False) -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) <= most
            and all(isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= 65535 for item in value)
        )

    return _rule(f"a list of at most {most} ports, each a whole number in 1..65535", accepts, restart)


def _environment() -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return isinstance(value, tuple) and all(_accepted_by(parse_pattern)(item) for item in value)

    expected = (
        'a list of names such as "CUDA_VISIBLE_DEVICES" or "SLURM_*", none that pam_adopt.so refuses (PATH, LD_*)'
    )
    return _rule(expected, accepts, False)


def _contact() -> Mapping[str, _Rule]:
    return _rule(f'a sentence of at most {CONTACT_MAX} printable ASCII characters, or ""', is_contact, False)


def _job_path() -> Mapping[str, _Rule]:
    expected = (
        "an absolute path whose last component has {job}, with {uid} at most once before it, "
        'such as "/jobs/uid_{uid}/job_{job}"'
    )
    return _rule(expected, _accepted_by(JobPath.parse_template), False)


def _node_name() -> Mapping[str, _Rule]:
    def accepts(value: object) -> bool:
        return (
            isinstance(value, str) and len(value) <= 63 and (value == "" or (value.isascii() and value.isprintable()))
        )

    return _rule('a host name of at most 63 characters, or "" for this host\'s', accepts, False)


@dataclass(frozen=True)
class AgentConfig:
    """[agent]: where sshd and users reach the agent, and what it says of itself."""

    pam_socket: str = field(default="/run/adoptd/pam.sock", metadata=_socket_path())
    user_socket: str = field(default="/run/adoptd/user.sock", metadata=_socket_path())
    log_level: str = field(default="info", metadata=_choice("error", "warning", "info", "debug"))
    node_name: str = field(default="", metadata=_node_name())

    def shown_name(self) -> str:
        """The node's name in messages: ``node_name`` or the short host name."""
        return self.node_name or socket.gethostname().partition(".")[0]


@dataclass(frozen=True)
class CalleridConfig:
    """[callerid]: the questions between nodes."""

    enabled: bool = field(default=True, metadata=_boolean(restart=True))
    listen: Tuple[str, ...] = field(default=("0.0.0.0", "::"), metadata=_addresses(restart=True))  # noqa: S104
    port: int = field(default=6830, metadata=_integer(1, 65535, restart=True))
    timeout_ms: int = field(default=300, metadata=_integer(10, 10_000, " milliseconds"))
    fallback: str = field(default="none", metadata=_choice("none", "slurm"))
    slurm_scontrol: str = field(default="", metadata=_path(optional=True))
    hint: bool = field(default=True, metadata=_boolean())


@dataclass(frozen=True)
class SealConfig:
    """[seal]: how agents know each other."""

    scheme: str = field(default="auto", metadata=_choice("auto", "slurm", "munge", "key"))
    key_file: str = field(default="/etc/adoptd/adoptd.key", metadata=_path())
    munge_socket: str = field(default="", metadata=_path(optional=True))
    slurm_key_file: str = field(default="", metadata=_path(optional=True))
    ttl_s: int = field(default=10, metadata=_integer(1, 300, " seconds"))


@dataclass(frozen=True)
class JobsConfig:
    """[jobs]: where the jobs of this node are."""

    backend: str = field(default="auto", metadata=_choice("auto", "slurm", "cgroup"))
    path: str = field(default="/jobs/uid_{uid}/job_{job}", metadata=_job_path())
    leaf: str = field(default="", metadata=_leaf())
    slurm_conf: str = field(default="", metadata=_path(optional=True))
    slurm_node_name: str = field(default="", metadata=_node_name())
    slurm_spool_dir: str = field(default="", metadata=_path(optional=True))


@dataclass(frozen=True)
class SessionConfig:
    """[session]: what a session is given beside its place in the job, and what its user is told."""

    environment: Tuple[str, ...] = field(default=(), metadata=_environment())
    notice: str = field(default="choice", metadata=_choice(*(notice.value for notice in Notice)))
    contact: str = field(default="", metadata=_contact())
    on_escape: str = field(default="readopt", metadata=_choice("readopt", "report"))


@dataclass(frozen=True)
class ProbeConfig:
    """[probe]: the BPF probe."""

    enabled: bool = field(default=True, metadata=_boolean(restart=True))
    pin_dir: str = field(default="/sys/fs/bpf/adoptd", metadata=_path(restart=True))
    source_dir: str = field(default="", metadata=_path(optional=True, restart=True))
    self_test_interval_s: int = field(default=60, metadata=_integer(1, 86_400, " seconds", restart=True))
    watched_ports: Tuple[int, ...] = field(default=(22,), metadata=_ports(WATCHED_PORTS, restart=True))


@dataclass(frozen=True)
class MetricsConfig:
    """[metrics]: the Prometheus endpoint."""

    enabled: bool = field(default=True, metadata=_boolean(restart=True))
    listen: str = field(default="127.0.0.1", metadata=_address(restart=True))
    port: int = field(default=9830, metadata=_integer(1, 65535, restart=True))
    tls_certificate: str = field(default="", metadata=_path(optional=True, restart=True))
    tls_key: str = field(default="", metadata=_path(optional=True, restart=True))
    tls_client_ca: str = field(default="", metadata=_path(optional=True, restart=True))
    textfile: str = field(default="", metadata=_path(optional=True, restart=True))


@dataclass(frozen=True)
class Config:
    """Everything the agent can be told. Each field is a table of the TOML file."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    callerid: CalleridConfig = field(default_factory=CalleridConfig)
    seal: SealConfig = field(default_factory=SealConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


_TABLES: Mapping[str, Type[object]] = {
    "agent": AgentConfig,
    "callerid": CalleridConfig,
    "seal": SealConfig,
    "jobs": JobsConfig,
    "session": SessionConfig,
    "probe": ProbeConfig,
    "metrics": MetricsConfig,
}


def load(file: Path) -> Config:
    """The configuration in ``file`` and in ``conf.d/*.toml`` beside it.

    A missing ``file`` is an error: the agent decides who gets in, and must not do so by defaults that
    nobody chose. Raises ConfigError with the file, the key, what was found and what was expected.
    """
    values: Dict[str, Dict[str, object]] = {name: {} for name in _TABLES}
    for path in (file, *_drop_ins(file)):
        for table, key, value in _entries(path):
            values[table][key] = value
    # The defaults with what the files say in their place; _entries checked every value against its rule.
    defaults = Config()
    settings = Config(**{name: dataclasses.replace(getattr(defaults, name), **values[name]) for name in _TABLES})
    _check_together(file, settings.metrics)
    return settings


def show(config: Config) -> str:
    """The configuration in force as TOML that :func:`load` reads back to the same value."""
    lines: List[str] = []
    for table in _TABLES:
        section = getattr(config, table)
        lines.append(f"[{table}]")
        lines.extend(f"{item.name} = {_toml(getattr(section, item.name))}" for item in dataclasses.fields(section))
        lines.append("")
    return "\n".join(lines)


def needs_restart(old: Config, new: Config) -> Tuple[str, ...]:
    """The changed keys, as ``table.key``, that a running agent cannot take over by a reload."""
    changed: List[str] = []
    for table in _TABLES:
        before, after = getattr(old, table), getattr(new, table)
        changed.extend(
            f"{table}.{item.name}"
            for item in dataclasses.fields(before)
            if item.metadata["rule"].restart and getattr(before, item.name) != getattr(after, item.name)
        )
    return tuple(changed)


def reloaded(old: Config, new: Config) -> Config:
    """What a running agent has in force after a reload: ``new``, with the keys that need a restart as in ``old``."""
    tables = {}
    for table in _TABLES:
        before, after = getattr(old, table), getattr(new, table)
        kept = {i.name: getattr(before, i.name) for i in dataclasses.fields(before) if i.metadata["rule"].restart}
        tables[table] = dataclasses.replace(after, **kept)
    return Config(**tables)


def _check_together(file: Path, metrics: MetricsConfig) -> None:
    """Keys that mean something only beside another. Half of TLS must not become none."""
    for key, needs in (
        ("tls_certificate", "tls_key"),
        ("tls_key", "tls_certificate"),
        ("tls_client_ca", "tls_certificate"),
    ):
        if getattr(metrics, key) and not getattr(metrics, needs):
            raise ConfigError(f"{file}: metrics.{key} is set and metrics.{needs} is not, expected both or neither")


def _drop_ins(file: Path) -> List[Path]:
    directory = file.parent / "conf.d"
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from None


def _entries(path: Path) -> Iterator[Tuple[str, str, object]]:
    for table, section in _parse(path).items():
        if table not in _TABLES:
            raise ConfigError(f"{path}: unknown table [{table}], expected one of {', '.join(_TABLES)}")
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {table} is {_found(section)}, expected a table [{table}]")
        rules = {item.name: item.metadata["rule"] for item in dataclasses.fields(_TABLES[table])}  # type: ignore[arg-type]
        for key, found in section.items():
            if key not in rules:
                raise ConfigError(f"{path}: unknown key {table}.{key}, expected one of {', '.join(rules)}")
            value = tuple(found) if isinstance(found, list) else found
            if not rules[key].accepts(value):
                raise ConfigError(f"{path}: {table}.{key} is {_found(found)}, expected {rules[key].expected}")
            yield table, key, value


def _parse(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _FILE_MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_FILE_MAX_BYTES} bytes, expected a configuration file")
    try:
        parsed: Mapping[str, object] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # ValueError also covers what is not UTF-8, and a decimal of more digits than int() takes.
        raise ConfigError(f"{path}: not TOML: {error}") from None
    return parsed


def _found(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:
        # A hexadecimal literal has no limit on its digits, its decimal form has (int_max_str_digits).
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int):
        return str(value)
    return '"' + "".join(_escaped(char) for char in str(value)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"
