"""The base model, the adapter on it, PEFT's files and the optimizer; no other package imports PEFT."""
