"""The configuration: every key does something, and what is not understood is an error that says all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nobody import as_nobody, public_path

from adoptd import config
from adoptd.config import Config
from adoptd.model import ConfigError

__all__ = ["public_path"]

# Another right value for every key there is, with what it becomes in TOML.
FLIPPED: Dict[Tuple[str, str], Tuple[object, str]] = {
    ("agent", "pam_socket"): ("/tmp/p.sock", '"/tmp/p.sock"'),
    ("agent", "user_socket"): ("/tmp/u.sock", '"/tmp/u.sock"'),
    ("agent", "log_level"): ("debug", '"debug"'),
    ("agent", "node_name"): ("n7", '"n7"'),
    ("callerid", "enabled"): (False, "false"),
    ("callerid", "listen"): (("10.0.0.7", "fd00::7"), '["10.0.0.7", "fd00::7"]'),
    ("callerid", "port"): (6831, "6831"),
    ("callerid", "timeout_ms"): (250, "250"),
    ("callerid", "fallback"): ("slurm", '"slurm"'),
    ("callerid", "slurm_scontrol"): ("/opt/slurm/bin/scontrol", '"/opt/slurm/bin/scontrol"'),
    ("callerid", "hint"): (False, "false"),
    ("seal", "scheme"): ("key", '"key"'),
    ("seal", "key_file"): ("/tmp/key", '"/tmp/key"'),
    ("seal", "slurm_key_file"): ("/etc/slurm/slurm.jwks", '"/etc/slurm/slurm.jwks"'),
    ("seal", "munge_socket"): ("/tmp/munge.socket.2", '"/tmp/munge.socket.2"'),
    ("seal", "ttl_s"): (20, "20"),
    ("jobs", "path"): ("/batch/{job}", '"/batch/{job}"'),
    ("jobs", "leaf"): ("session/tasks", '"session/tasks"'),
    ("jobs", "backend"): ("slurm", '"slurm"'),
    ("jobs", "slurm_conf"): ("/opt/slurm.conf", '"/opt/slurm.conf"'),
    ("jobs", "slurm_node_name"): ("n7", '"n7"'),
    ("jobs", "slurm_spool_dir"): ("/var/spool/n7", '"/var/spool/n7"'),
    ("session", "environment"): (("SLURM_*", "CUDA_VISIBLE_DEVICES"), '["SLURM_*", "CUDA_VISIBLE_DEVICES"]'),
    ("session", "notice"): ("always", '"always"'),
    ("session", "contact"): ("Write to hpc@example.org.", '"Write to hpc@example.org."'),
    ("session", "on_escape"): ("report", '"report"'),
    ("probe", "enabled"): (False, "false"),
    ("probe", "pin_dir"): ("/sys/fs/bpf/other", '"/sys/fs/bpf/other"'),
    ("probe", "source_dir"): ("/usr/lib/adoptd/bpf", '"/usr/lib/adoptd/bpf"'),
    ("probe", "self_test_interval_s"): (5, "5"),
    ("probe", "watched_ports"): ((22, 2222), "[22, 2222]"),
    ("metrics", "enabled"): (False, "false"),
    ("metrics", "listen"): ("::1", '"::1"'),
    ("metrics", "port"): (9831, "9831"),
    ("metrics", "tls_certificate"): ("/etc/adoptd/metrics.crt", '"/etc/adoptd/metrics.crt"'),
    ("metrics", "tls_key"): ("/etc/adoptd/metrics.key", '"/etc/adoptd/metrics.key"'),
    ("metrics", "tls_client_ca"): ("/etc/adoptd/prometheus.crt", '"/etc/adoptd/prometheus.crt"'),
    ("metrics", "textfile"): ("/var/lib/metrics/adoptd.prom", '"/var/lib/metrics/adoptd.prom"'),
}

# Keys that are refused without others.
COMPANIONS: Dict[Tuple[str, str], Tuple[str, ...]] = {
    ("metrics", "tls_certificate"): ("tls_key",),
    ("metrics", "tls_key"): ("tls_certificate",),
    ("metrics", "tls_client_ca"): ("tls_certificate", "tls_key"),
}


def every_key() -> List[Tuple[str, str]]:
    return [
        (table.name, key.name)
        for table in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), table.name))
    ]


def write(directory: Path, text: str, name: str = "adoptd.toml") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        config.load(path)
    text = str(refusal.value)
    assert "\n" not in text
    return text


# ---- what is refused


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """Who gets in is not decided by defaults that nobody chose."""
    assert refused(tmp_path / "adoptd.toml") == f"{tmp_path}/adoptd.toml: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[agnet]\n", ["unknown table [agnet]", "agent, callerid, seal, jobs, session, probe, metrics"]),
        ('pam_socket = "/x"\n', ["unknown table [pam_socket]"]),
        ('agent = "x"\n', ["agent is 'x'", "a table [agent]"]),
        ("[[agent]]\n", ["agent is [{}]", "a table [agent]"]),
        ('[agent]\nsocket = "/x"\n', ["unknown key agent.socket", "pam_socket, user_socket, log_level, node_name"]),
        ('[agent]\npam_socket = "run/x"\n', ["agent.pam_socket is 'run/x'", "an absolute path"]),
        ('[agent]\npam_socket = ""\n', ["agent.pam_socket is ''", "an absolute path"]),
        ('[agent]\npam_socket = "/a\\u0000b"\n', ["agent.pam_socket is '/a\\x00b'", "an absolute path"]),
        ("[agent]\npam_socket = 1\n", ["agent.pam_socket is 1", "an absolute path"]),
        ('[agent]\nlog_level = "INFO"\n', ["agent.log_level is 'INFO'", '"error", "warning", "info", "debug"']),
        ("[agent]\nlog_level = 6\n", ["agent.log_level is 6", '"info"']),
        ("[agent]\nlog_level = []\n", ["agent.log_level is []", '"info"']),
        (f'[agent]\nnode_name = "{"n" * 64}"\n', ["agent.node_name is 'nnn", "at most 63 characters"]),
        ('[agent]\nnode_name = "n\\n1"\n', ["agent.node_name is 'n\\n1'", "a host name"]),
        ("[callerid]\nenabled = 1\n", ["callerid.enabled is 1", "true or false"]),
        ('[callerid]\nenabled = "true"\n', ["callerid.enabled is 'true'", "true or false"]),
        ("[callerid]\nlisten = []\n", ["callerid.listen is []", "one or more IP addresses"]),
        ('[callerid]\nlisten = "::"\n', ["callerid.listen is '::'", "a list of one or more IP addresses"]),
        ('[callerid]\nlisten = ["localhost"]\n', ["callerid.listen is ['localhost']", "IP addresses"]),
        ("[callerid]\nlisten = [[]]\n", ["callerid.listen is [[]]", "IP addresses"]),
        ("[callerid]\nlisten = [1]\n", ["callerid.listen is [1]", "IP addresses"]),
        ("[callerid]\nport = 0\n", ["callerid.port is 0", "1..65535"]),
        ("[callerid]\nport = 65536\n", ["callerid.port is 65536", "1..65535"]),
        ("[callerid]\nport = true\n", ["callerid.port is True", "a whole number in 1..65535"]),
        ("[callerid]\nport = 6830.0\n", ["callerid.port is 6830.0", "a whole number"]),
        ('[callerid]\nport = "6830"\n', ["callerid.port is '6830'", "a whole number"]),
        ("[callerid]\nport = nan\n", ["callerid.port is nan", "a whole number"]),
        (
            f"[callerid]\nport = 0x{'f' * 6000}\n",
            ["callerid.port is a number of thousands of digits", "a whole number"],
        ),
        ('[callerid]\nfallback = "scontrol"\n', ["callerid.fallback is 'scontrol'", '"none", "slurm"']),
        ('[callerid]\nslurm_scontrol = "scontrol"\n', ["callerid.slurm_scontrol is 'scontrol'", "an absolute path"]),
        ("[callerid]\ntimeout_ms = 9\n", ["callerid.timeout_ms is 9", "10..10000 milliseconds"]),
        ("[callerid]\ntimeout_ms = 2001-01-01\n", ["callerid.timeout_ms is datetime", "a whole number"]),
        ('[seal]\nscheme = "none"\n', ["seal.scheme is 'none'", '"auto", "slurm", "munge", "key"']),
        ("[seal]\nttl_s = 301\n", ["seal.ttl_s is 301", "1..300 seconds"]),
        ('[jobs]\npath = "jobs/{job}"\n', ["jobs.path is 'jobs/{job}'", "/jobs/uid_{uid}/job_{job}"]),
        ('[jobs]\npath = "/jobs"\n', ["jobs.path is '/jobs'", "{job}"]),
        ('[jobs]\npath = "/{job}/{job}"\n', ["jobs.path is '/{job}/{job}'", "{job}"]),
        ("[jobs]\npath = 1\n", ["jobs.path is 1", "/jobs/uid_{uid}/job_{job}"]),
        ('[jobs]\nleaf = "/x"\n', ["jobs.leaf is '/x'", "relative"]),
        ('[jobs]\nleaf = "a/../b"\n', ["jobs.leaf is 'a/../b'", "relative"]),
        ('[jobs]\nleaf = "a b"\n', ["jobs.leaf is 'a b'", "relative"]),
        ('[jobs]\nleaf = "\u00fc"\n', ["jobs.leaf is ", "relative"]),
        ('[jobs]\nbackend = "slurm-like"\n', ["jobs.backend is 'slurm-like'", '"cgroup"']),
        ('[session]\nenvironment = "SLURM_*"\n', ["session.environment is 'SLURM_*'", "a list of names"]),
        ('[session]\nenvironment = ["SLURM_*", "PATH"]\n', ["session.environment is ['SLURM_*', 'PATH']", "LD_*"]),
        ('[session]\non_escape = "kill"\n', ["session.on_escape is 'kill'", '"readopt", "report"']),
        ("[session]\nnotice = true\n", ["session.notice is True", '"choice", "always", "never"']),
        ('[session]\ncontact = "a\\nb"\n', ["session.contact is", "160 printable ASCII"]),
        (f'[session]\ncontact = "{"x" * 161}"\n', ["session.contact is", "160 printable ASCII"]),
        ('[session]\ncontact = "\u00fcber"\n', ["session.contact is", "160 printable ASCII"]),
        ('[session]\nenvironment = ["*"]\n', ["session.environment is ['*']", "a list of names"]),
        ('[metrics]\nlisten = "localhost"\n', ["metrics.listen is 'localhost'", "an IP address"]),
        ('[metrics]\ntls_key = "/k"\n', ["metrics.tls_key is set", "metrics.tls_certificate is not", "neither"]),
        ('[metrics]\ntls_certificate = "/c"\n', ["metrics.tls_certificate is set", "metrics.tls_key is not"]),
        ('[metrics]\ntls_client_ca = "/c"\n', ["metrics.tls_client_ca is set", "metrics.tls_certificate is not"]),
        ("[probe]\nself_test_interval_s = -1\n", ["probe.self_test_interval_s is -1", "1..86400 seconds"]),
        ("[agent\n", ["not TOML"]),
        ('[agent]\nlog_level = "info"\nlog_level = "info"\n', ["not TOML"]),
        ("[agent]\n[agent]\n", ["not TOML"]),
        ("x = " + "[" * 20000 + "\n", ["not TOML"]),
        ("x = " + "1" * 6000 + "\n", ["not TOML"]),
        ("\0", ["not TOML"]),
    ],
)
def test_what_is_not_understood_is_refused_in_full(tmp_path: Path, text: str, words: List[str]) -> None:
    """The message names the file, the key, what was found and what was expected."""
    path = write(tmp_path, text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message
    assert len(message) < 500


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    """TOML is UTF-8; a Latin-1 comment is an error and not a crash."""
    path = tmp_path / "adoptd.toml"
    path.write_bytes(b"# gr\xfc\xdfe\n")
    assert refused(path).startswith(f"{path}: not TOML: ")


def test_a_huge_file_is_some_other_file(tmp_path: Path) -> None:
    """A file over 1 MiB is refused by its size, before it is parsed."""
    path = write(tmp_path, "#" * ((1 << 20) + 1))
    assert "larger than 1048576 bytes" in refused(path)
    config.load(write(tmp_path, "#" * (1 << 20)))


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    """The error of the operating system comes with the path."""
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


def test_a_conf_d_that_is_a_file(tmp_path: Path) -> None:
    """conf.d is named in the message, not the main file."""
    path = write(tmp_path, "")
    write(tmp_path, "", "conf.d")
    assert refused(path) == f"{tmp_path}/conf.d: cannot be read: Not a directory"


def test_a_drop_in_that_cannot_be_read(tmp_path: Path) -> None:
    """A dangling link among the drop-ins stops the start: what it would have said is not known."""
    path = write(tmp_path, "")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10-site.toml").symlink_to(tmp_path / "gone")
    assert refused(path) == f"{tmp_path}/conf.d/10-site.toml: cannot be read: No such file or directory"


def test_what_an_ordinary_user_may_not_read(public_path: Path) -> None:
    """No permission, for the file or for conf.d, is an error that names which."""
    base = public_path / "etc"
    path = write(base, "")
    (base / "conf.d").mkdir(mode=0o700)
    code = "try:\n config.load(Path(sys.argv[1]))\nexcept config.ConfigError as e:\n print(e)"
    assert as_nobody(code, str(path)).strip() == f"{base}/conf.d: cannot be read: Permission denied"
    path.chmod(0o600)
    (base / "conf.d").chmod(0o755)
    assert as_nobody(code, str(path)).strip() == f"{path}: cannot be read: Permission denied"


# ---- what is taken


def test_every_key_there_is_has_a_test() -> None:
    """A new key without another value above fails here; so does a table that load() does not know."""
    assert set(every_key()) == set(FLIPPED)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    """The defaults are values of the keys: show() writes them and load() takes them."""
    loaded = config.load(write(tmp_path, ""))
    assert loaded == Config()
    assert config.load(write(tmp_path, config.show(Config()), "again/adoptd.toml")) == Config()


@pytest.mark.parametrize(("table", "key"), sorted(FLIPPED))
def test_every_key_lands_in_its_place_and_nowhere_else(tmp_path: Path, table: str, key: str) -> None:
    """Read from the file, held as that field, all others untouched, shown, and read back equal."""
    value, text = FLIPPED[table, key]
    beside = COMPANIONS.get((table, key), ())
    lines = [f"{name} = {FLIPPED[table, name][1]}" for name in (key, *beside)]
    loaded = config.load(write(tmp_path, "\n".join([f"[{table}]", *lines, ""])))
    assert getattr(getattr(loaded, table), key) == value
    assert getattr(getattr(Config(), table), key) != value
    assert sorted(differing(Config(), loaded)) == sorted((table, name) for name in (key, *beside))
    shown = config.show(loaded)
    assert f"{key} = {text}" in shown.split("\n")
    assert config.load(write(tmp_path, shown, "shown/adoptd.toml")) == loaded


def differing(one: Config, other: Config) -> List[Tuple[str, str]]:
    return [
        (table, key)
        for table, key in every_key()
        if getattr(getattr(one, table), key) != getattr(getattr(other, table), key)
    ]


@pytest.mark.parametrize(
    "value",
    ["/a b", '/"quoted"\\', "/tab\tand\nnewline", "/\u00fcber", "/\u2028", "/\U0001f600", "/\U000e0001x", "/\x7f"],
)
def test_show_writes_what_load_reads_back(tmp_path: Path, value: str) -> None:
    """Quotes, control characters and characters beyond the first plane survive the round."""
    told = Config(seal=config.SealConfig(key_file=value))
    assert config.load(write(tmp_path, config.show(told))) == told


@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12))
def test_show_escapes_any_text(text: str) -> None:
    """For every text that TOML can hold."""
    told = Config(probe=config.ProbeConfig(pin_dir="/" + text))
    assert config.tomllib.loads(config.show(told))["probe"]["pin_dir"] == "/" + text


def test_drop_ins_win_key_by_key_in_name_order(tmp_path: Path) -> None:
    """conf.d/20 over conf.d/10 over the file; other keys of the table stay; other files are not read."""
    path = write(tmp_path, "[callerid]\nport = 1\ntimeout_ms = 100\n[seal]\nttl_s = 1\n")
    write(tmp_path, "[callerid]\nport = 3\n", "conf.d/20-site.toml")
    write(tmp_path, "[callerid]\nport = 2\n[seal]\nttl_s = 2\n", "conf.d/10-site.toml")
    write(tmp_path, "not TOML at all", "conf.d/30-site.toml.bak")
    write(tmp_path, "not TOML at all", "conf.d/README")
    loaded = config.load(path)
    assert (loaded.callerid.port, loaded.callerid.timeout_ms, loaded.seal.ttl_s) == (3, 100, 2)


def test_a_bad_drop_in_is_named_itself(tmp_path: Path) -> None:
    """The message names the drop-in even where the main file has the same key."""
    path = write(tmp_path, "[callerid]\nport = 1\n")
    bad = write(tmp_path, "[callerid]\nport = 'x'\n", "conf.d/10.toml")
    assert refused(path).startswith(f"{bad}: callerid.port is 'x'")


def test_the_shown_name_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users know their nodes by the short name, unless the site says otherwise."""
    monkeypatch.setattr("socket.gethostname", lambda: "n1.cluster.example")
    assert config.AgentConfig().shown_name() == "n1"
    assert config.AgentConfig(node_name="big-one").shown_name() == "big-one"


# What a running agent takes over on SIGHUP; everything else is bound to a socket or to the kernel.
RELOADED = {
    ("agent", "log_level"),
    ("agent", "node_name"),
    ("callerid", "timeout_ms"),
    ("callerid", "fallback"),
    ("callerid", "slurm_scontrol"),
    ("callerid", "hint"),
    ("session", "environment"),
    ("session", "notice"),
    ("session", "contact"),
    ("session", "on_escape"),
    ("seal", "scheme"),
    ("seal", "key_file"),
    ("seal", "munge_socket"),
    ("seal", "slurm_key_file"),
    ("seal", "ttl_s"),
    ("jobs", "path"),
    ("jobs", "leaf"),
    ("jobs", "backend"),
    ("jobs", "slurm_conf"),
    ("jobs", "slurm_node_name"),
    ("jobs", "slurm_spool_dir"),
}


@pytest.mark.parametrize(("table", "key"), sorted(FLIPPED))
def test_which_keys_need_a_restart(table: str, key: str) -> None:
    """A changed key is reported exactly when a reload cannot take it over; an unchanged one never."""
    value, _ = FLIPPED[table, key]
    changed = dataclasses.replace(
        Config(),
        **{table: dataclasses.replace(getattr(Config(), table), **{key: value})},  # type: ignore[arg-type]
    )
    assert config.needs_restart(Config(), changed) == (() if (table, key) in RELOADED else (f"{table}.{key}",))
    assert config.needs_restart(changed, changed) == ()
