"""Rules: how a conditional and a negative prediction are combined."""
