"""What fedlora is compared with: federated LoRA as Flower's own template for language models writes it."""
