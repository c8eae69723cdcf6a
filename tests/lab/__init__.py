"""A small cluster on one machine: real sshd, ssh, PAM, munged, agents and cgroups, in namespaces.

`demo` is its command line, `scenarios` what it shows, `nodes` the cluster itself. Nothing here is
part of what gets installed.
"""
