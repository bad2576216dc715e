"""The verbs as functions: `yeonma.sft(...)` and its kin, what they return, and how a notebook shows it."""
