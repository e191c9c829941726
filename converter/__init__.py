"""From safetensors to `.df11` and back, within a fixed memory bound."""
