"""Every interleaving of a small world, explored with the production cores (PROTOCOL J, O, S, F, G). See docs/exhaustive.md."""
