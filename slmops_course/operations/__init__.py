"""Operating a model: a gate before release, a registry of versions, and what carries them to devices and back."""
