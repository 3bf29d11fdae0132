"""This machine: the spool of paid answers and images, and the locks."""
