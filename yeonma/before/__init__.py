"""Seeing it before it costs time: rows as the model will see them, the whole data set, what a run takes."""
