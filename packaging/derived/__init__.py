"""What a package ships that is made from the agent's own tables: manual pages, completions, the configuration.

Only for the building of packages and its tests; never imported by the agent. Run as ``python -m derived``.
"""
