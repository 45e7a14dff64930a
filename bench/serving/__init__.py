"""How fast requests at all steps are served (`python -m bench.serving`), and how long (`bench.serving.soak`)."""
