"""What is known of a spectrum: estimates, rules, deflation, accuracy, densities, eigenspaces,
files."""
