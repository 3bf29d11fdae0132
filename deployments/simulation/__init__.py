"""A batch in virtual time, behind `python -m deployments.simulate`."""
