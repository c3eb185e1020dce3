"""Fine-tunes text-embedding models with GISTEmbed (Solatorio 2024, arXiv 2402.16829)."""

__version__ = "0.1.0"
