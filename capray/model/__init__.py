"""The captioner in pure PyTorch: encoder, attention, decoder, beam search, checkpoint. Knows no Ray."""
