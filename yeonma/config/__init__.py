"""Settings: every option once; command line, YAML and Python keywords into checked values. No torch here."""
