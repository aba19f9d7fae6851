"""The ClientApp under its path of version 0.1, which users' own pyproject files name."""

from fedlora.client.deployment.app import app as app
