"""The bundled clips and the demo that runs on them."""
