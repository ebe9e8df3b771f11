"""Channel and spatial gates on feature maps."""
