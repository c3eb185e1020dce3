"""Questions and answers, and nothing else: a batch's other answers are negatives, but for those that the guide finds fitting.

python examples/faq_pairs.py [MODEL [KEY=VALUE ...]]
"""

import json
import sys
from pathlib import Path

from gist_train import load_config, train

name, overrides = (sys.argv[1:2] or ["sentence-transformers/all-MiniLM-L6-v2"])[0], sys.argv[2:]
FAQ = {
    "How do I reset my password?": "Open Settings, then Security, and choose Reset password.",
    "I can't log in any more": "Reset your password under Settings, Security. After five tries an account is locked for an hour.",
    "Where is my parcel?": "The link in the mail that says your order was sent shows where it is.",
    "Can I change the address of an order?": "Until it is packed: open Orders and choose Change address.",
    "How long do refunds take?": "Three working days after we have the goods, on the card that you paid with.",
    "Do you ship to Norway?": "We ship to all of Europe. Customs of Norway asks for its own fee.",
    "May I pay by invoice?": "Companies may. Ask for it under Payment, with your VAT number.",
    "The item came broken": "We are sorry. Send a picture within 14 days, and a new one is on its way the same day.",
    "How do I cancel my subscription?": "Open Settings, then Subscription. It ends with the month that is paid.",
    "Is there a student discount?": "Students get 20 % with an address of their university.",
}
rows = [{"anchor": question, "positive": answer} for question, answer in FAQ.items()]
Path("faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
config = {
    "name": "faq",
    "model": {"name": name},
    "guide": {"name": name},
    "data": {"train": [{"source": "jsonl", "path": "faq.jsonl"}]},
    "training": {"batch_size": 5, "epochs": 4},
    "optimizer": {"lr": 2e-5},
    "tracking": {"log_every": 1},
}
run = train(load_config(config, overrides))
print(run.metrics()[["loss", "masked_ap"]])  # masked_ap: the share of other answers that the guide left out
print("the model:", run.export("faq-model"))
