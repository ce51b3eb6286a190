"""The folder of a sampling run: what is there, who works on what, and its status."""
