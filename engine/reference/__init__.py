"""The definition of every op in plain PyTorch. Imports torch only."""
