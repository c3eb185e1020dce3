"""Who is to be cited for a model: the authors of what it was trained with, as BibTeX."""

from collections.abc import Mapping
from typing import Any


def citations(config: Mapping[str, Any]) -> list[str]:
    """BibTeX entries for a run: sentence-transformers' and, where they were used, GISTEmbed's and those of further methods.

    Args:
        config: the run's, as plain values; a section that an old run does not have counts as unused.
    """
    loss, distillation = config.get("loss", {}), config.get("distillation", {})
    used = {
        "gistembed": config["guide"] is not None,
        "sentence_bert": True,
        "matryoshka": bool(loss.get("dimensions")),
        "gradient_cache": config["training"].get("max_tokens_per_forward") is not None,
        "hardness": bool(loss.get("hardness")),
        "distillation": bool(distillation.get("weight")),
        "mining": config["data"].get("hard_negatives") is not None,
        "lora": config["model"].get("lora") is not None,
    }
    return [bibtex(key) for key, was_used in used.items() if was_used]


_WORKS = {
    "gistembed": (
        "solatorio2024gistembed",
        "Aivin V. Solatorio",
        "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
        2024,
        "2402.16829",
    ),
    "sentence_bert": (
        "reimers2019sentencebert",
        "Nils Reimers and Iryna Gurevych",
        "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        2019,
        "1908.10084",
    ),
    "matryoshka": (
        "kusupati2022matryoshka",
        "Aditya Kusupati and Gantavya Bhatt and Aniket Rege and Matthew Wallingford and Aditya Sinha and Vivek Ramanujan "
        "and William Howard-Snyder and Kaifeng Chen and Sham Kakade and Prateek Jain and Ali Farhadi",
        "Matryoshka Representation Learning",
        2022,
        "2205.13147",
    ),
    "gradient_cache": (
        "gao2021scaling",
        "Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan",
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        2021,
        "2101.06983",
    ),
    "hardness": (
        "lan2025llave",
        "Zhibin Lan and Liqiang Niu and Fandong Meng and Jie Zhou and Jinsong Su",
        "LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning",
        2025,
        "2503.04812",
    ),
    "distillation": (
        "hinton2015distilling",
        "Geoffrey Hinton and Oriol Vinyals and Jeff Dean",
        "Distilling the Knowledge in a Neural Network",
        2015,
        "1503.02531",
    ),
    "mining": (
        "moreira2024nvretriever",
        "Gabriel de Souza P. Moreira and Radek Osmulski and Mengyao Xu and Ronay Ak and Benedikt Schifferer and Even Oldridge",
        "NV-Retriever: Improving text embedding models with effective hard-negative mining",
        2024,
        "2407.15831",
    ),
    "lora": (
        "hu2021lora",
        "Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and Shean Wang and Lu Wang "
        "and Weizhu Chen",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        2021,
        "2106.09685",
    ),
}
"""Name, authors, title, year and arXiv number."""


def bibtex(work: str) -> str:
    """The entry of a work by our name for it."""
    name, authors, title, year, arxiv = _WORKS[work]
    fields = {"title": title, "author": authors, "year": year, "eprint": arxiv, "archivePrefix": "arXiv"}
    lines = "".join(f"  {field} = {{{value}}},\n" for field, value in fields.items())
    return f"@misc{{{name},\n{lines}}}"
