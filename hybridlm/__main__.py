"""`python -m hybridlm` is `hybridlm`."""

from hybridlm.cli import app

app()
