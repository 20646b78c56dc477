"""Look at what a teacher pass and a gate have found out: statistics, and the tokens of single samples."""
