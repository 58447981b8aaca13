"""The live page: one picture for all viewers, figures, and two controls."""
