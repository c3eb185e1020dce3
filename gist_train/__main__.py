"""`python -m gist_train`, so that `accelerate launch -m gist_train train CONFIG` works."""

from gist_train.cli import main

main()
