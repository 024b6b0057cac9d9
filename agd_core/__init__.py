"""The method: adapters, guidance and the adapter file. torch, einops and safetensors only."""
