"""What a model kept of what another one knew: general questions, and the other one's own answers."""
