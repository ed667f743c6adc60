"""Event cameras: recordings, frames made of them, and sets to train on."""

from spikejax.data.events.sets import EventSet, Framing, load

__all__ = ["EventSet", "Framing", "load"]
