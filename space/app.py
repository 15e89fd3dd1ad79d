"""A language model and shallower copies of it, side by side; models.yaml says which."""

from pathlib import Path

from hf_layerprune.demo import launch_space

launch_space(Path(__file__).with_name("models.yaml"))
