"""What is measured of a model: its loss, as a function of the weights."""
