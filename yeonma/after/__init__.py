"""What one does with an adapter folder once it is there."""
