"""How the flows are deployed: see docs/."""
