"""`yeonma studio`: runs and rows in the browser."""
