"""Results about spectra: rules, deflation, estimates and their errors, eigenspaces, files."""
