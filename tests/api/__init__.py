"""The API side, with no Prefect in it."""
