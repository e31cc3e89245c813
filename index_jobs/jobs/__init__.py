"""The jobs: build, update (also over HTTP), watch (a gallery), retrain (on clicks), and the quality gate."""
