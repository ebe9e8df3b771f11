"""The mechanisms: one folder per decision, one file per mechanism."""
