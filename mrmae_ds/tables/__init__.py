"""The paper's tables, built from run records."""
