"""A Debian 12 virtual machine with systemd as PID 1, and what is tried in it."""
