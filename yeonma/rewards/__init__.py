"""Rewards: how good answers are."""
