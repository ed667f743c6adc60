"""Networks: VGG and residual networks, spiking or not by the factory ``neuron``."""
