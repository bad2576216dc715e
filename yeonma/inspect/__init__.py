"""What a run would train on: rows in colour, the audit, the forecast."""
