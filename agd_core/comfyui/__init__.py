"""The only bridge to ComfyUI."""
