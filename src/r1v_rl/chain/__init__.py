"""A chain of stages from one recipe to the next: what has to run, running it, and the table of what came out."""
