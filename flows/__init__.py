"""What gets deployed: each file one flow, thin."""
