"""The command flux-prefect."""
