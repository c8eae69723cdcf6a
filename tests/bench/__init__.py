"""./dev bench: what adoptd costs, measured beside what it is to replace."""
