"""The parts that mixers and models are made of."""
