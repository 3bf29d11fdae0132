"""How the flows are deployed: see README.md."""
