"""One file for each public call, named as the call."""
