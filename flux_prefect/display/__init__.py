"""What people look at: progress, artifacts, galleries, contact sheets, run names and events."""
