"""Reinforcement learning with verifiable rewards for language models in JAX."""
