"""What several test modules share: models, tokenizers, programs, and how near two results are."""
