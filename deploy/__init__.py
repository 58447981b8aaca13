"""From a model file to a board that runs it: evaluate, inspect, fetch. No torch."""
