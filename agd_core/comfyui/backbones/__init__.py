"""What a base family is to adapters: its layers, how its evaluation is intercepted, its names."""
