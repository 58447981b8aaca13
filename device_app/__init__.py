"""The live camera app: camera -> newest frame -> detector -> screen. No torch."""
