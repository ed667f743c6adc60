"""Building blocks besides the neuron: norms, recurrence, windows, quantised ReLU."""
