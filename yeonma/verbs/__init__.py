"""The verbs of the command line that are no room of their own: settings in, files out."""
