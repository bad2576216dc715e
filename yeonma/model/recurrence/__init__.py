"""Recurrent layers over a forest: a child starts from its parent's last state and last convolution inputs."""
