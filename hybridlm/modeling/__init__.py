"""The models and their parts: flat, so that the folder travels whole to the Hub."""
