"""How the bundled models and reviews were made."""
