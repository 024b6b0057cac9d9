"""The only bridge to ComfyUI: finding it, finding sites in its models, patching and evaluating them."""
