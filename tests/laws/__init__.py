"""Properties that hold for every network, checked on random ones."""
