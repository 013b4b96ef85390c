"""The mathematics: arrays and callables in, arrays out. Knows neither Keras nor a framework."""
