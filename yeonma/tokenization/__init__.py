"""Text to examples: the encoder, chat templates, the token store, the data set."""
